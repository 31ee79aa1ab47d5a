"""The life of an adapter version over gRPC: listed, pinned, deleted, watched, and each change made once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest

from lora_runtime.adapters.sources.fetch import Fetcher
from lora_runtime.errors import MultiloraError
from server.control.places import Places
from server.pb.multilora.v1 import adapters_pb2 as pb
from server.pb.multilora.v1 import common_pb2
from tests.service.fake_runtime import RESIDENT_BYTES, FakeEngine, write_adapter
from tests.service.harness import Harness, classify_request, failure_of, running

LABELS = {"labels": ["a", "b"]}
NEWS_2 = "tenants/default/adapters/news/versions/2"


@pytest.fixture
def many_root(tmp_path: Path) -> Path:
    """`news` 1 and 2, `acme/news` 1 and 3, `zoo/news` 1, `names` of tokens, `nan` that cannot be loaded; `more`."""
    root = tmp_path / "adapters"
    for folder in ("news/1", "news/2", "acme/news/1", "acme/news/3", "zoo/news/1"):
        write_adapter(root / folder, **LABELS)
    write_adapter(root / "names", task="classify_tokens", labels=["O", "B-PER"])
    write_adapter(root / "nan", **LABELS, weights="broken")
    write_adapter(root / "sources" / "kept here" / "more", **LABELS)
    return root


@pytest.fixture
async def server(many_root: Path, tmp_path: Path) -> AsyncGenerator[Harness]:
    async with running(many_root, state=tmp_path / "state") as harness:
        yield harness


def short(name: str) -> str:
    """`tenant/name@version` of a resource name."""
    _, tenant, _, adapter, _, version = name.split("/")
    return f"{tenant}/{adapter}@{version}"


async def listed(server: Harness, size: int = 0, **filters: Any) -> list[str]:
    """Every page of a list."""
    names: list[str] = []
    token = ""
    while True:
        request = pb.ListAdaptersRequest(page_size=size, page_token=token, **filters)
        page = await server.adapters.ListAdapters(request)
        names += [short(adapter.name) for adapter in page.adapters]
        if not (token := page.next_page_token):
            return names
        assert len(page.adapters) == size


async def get(server: Harness, adapter: str) -> pb.Adapter:
    return (await server.adapters.GetAdapter(pb.GetAdapterRequest(adapter=adapter))).adapter


async def register(server: Harness, name: str, **fields: Any) -> pb.Adapter:
    request = pb.RegisterAdapterRequest(**{"name": name, "source": "news/1"} | fields)
    return (await server.adapters.RegisterAdapter(request)).adapter


async def pin(server: Harness, adapter: str, pinned: bool = True, **fields: Any) -> pb.Adapter:
    request = pb.PinAdapterRequest(adapter=adapter, pinned=pinned, **fields)
    return (await server.adapters.PinAdapter(request)).adapter


async def delete(server: Harness, adapter: str, **fields: Any) -> pb.DeleteAdapterResponse:
    return await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter=adapter, **fields))


def hold(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, method: str) -> tuple[threading.Event, threading.Event]:
    """Make a call of the engine wait; events that say that it has begun, and that let it go on."""
    begun, go = threading.Event(), threading.Event()
    original = getattr(engine, method)

    def held(*args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            begun.set()
            go.wait(10)
            try:
                future.set_result(original(*args, **kwargs).result())
            except MultiloraError as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    monkeypatch.setattr(engine, method, held)
    return begun, go


async def test_lists_are_filtered_and_paged(server: Harness) -> None:
    ours = ["default/names@1", "default/nan@1", "default/news@1", "default/news@2"]
    theirs = ["acme/news@1", "acme/news@3"]
    await failure_of(server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="nan", wait=True)))
    await server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="news@2", wait=True))
    for size in (1, 2, 3, 1000):
        assert await listed(server, size) == ours
        assert await listed(server, size, tenant="-") == [*theirs, *ours, "zoo/news@1"]
        assert await listed(server, size, tenant="acme") == theirs
        assert await listed(server, size, tenant="-", name_prefix="ne") == [*theirs, *ours[2:], "zoo/news@1"]
    assert await listed(server, tenant="nobody") == []
    assert await listed(server, name_prefix="news") == ours[2:]
    assert await listed(server, state=pb.ADAPTER_STATE_READY) == ["default/news@2"]
    assert await listed(server, state=pb.ADAPTER_STATE_FAILED) == ["default/nan@1"]
    assert await listed(server, 1, state=pb.ADAPTER_STATE_REGISTERED) == ["default/names@1", "default/news@1"]
    assert await listed(server, task=common_pb2.TASK_CLASSIFY_TOKENS) == ["default/names@1"]
    assert await listed(server, tenant="acme", task=common_pb2.TASK_CLASSIFY_TOKENS) == []


async def test_a_wrong_filter_is_named(server: Harness) -> None:
    page = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1))
    for fields, field in (
        ({"tenant": "a b"}, "tenant"),
        ({"state": 99}, "state"),
        ({"task": 99}, "task"),
        ({"tenant": "acme", "page_token": page.next_page_token}, "page_token"),
    ):
        failure = await failure_of(server.adapters.ListAdapters(pb.ListAdaptersRequest(**fields)))
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field), fields
    watching = server.adapters.WatchAdapters(pb.WatchAdaptersRequest(tenant="a b"))
    assert (await failure_of(watching.read())).field == "tenant"


async def test_a_page_goes_on_though_its_last_adapter_was_deleted(server: Harness) -> None:
    first = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=3))
    assert short(first.adapters[-1].name) == "default/news@1"
    await server.adapters.SetAlias(pb.SetAliasRequest(adapter="news", alias="default", version=2))
    await delete(server, "news@1")
    rest = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=first.next_page_token))
    assert [short(adapter.name) for adapter in rest.adapters] == ["default/news@2"]


async def test_each_tenant_has_names_of_its_own(server: Harness) -> None:
    theirs = await register(server, "acme/news")
    assert (theirs.name, theirs.source) == ("tenants/acme/adapters/news/versions/4", "news/1")
    assert (await register(server, "tenants/fresh/adapters/news")).version == 1
    assert (await server.inference.Classify(classify_request("acme/news@3", "x"))).adapter.startswith("tenants/acme/")
    assert (await failure_of(get(server, "news@3"))).code is grpc.StatusCode.NOT_FOUND
    await delete(server, "zoo/news@1")
    assert await listed(server, tenant="zoo") == []
    assert await listed(server, name_prefix="news") == ["default/news@1", "default/news@2"]


async def test_a_pinned_adapter_is_neither_unloaded_nor_deleted(server: Harness) -> None:
    assert ((pinned := await pin(server, "news@2")).state, pinned.pinned) == (pb.ADAPTER_STATE_READY, True)
    for call in (
        server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="news@2")),
        delete(server, "news@2"),
    ):
        failure = await failure_of(call)
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "pinned" in failure.message
    assert not (await pin(server, "news@2", False)).pinned
    unloaded = await server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="news@2"))
    assert unloaded.freed_bytes == RESIDENT_BYTES
    await pin(server, "news@2")
    await pin(server, "news@2", False)
    assert (await delete(server, "news@2")).freed_bytes == RESIDENT_BYTES


async def test_what_cannot_be_loaded_is_not_pinned(server: Harness) -> None:
    assert (await failure_of(pin(server, "nan"))).code is grpc.StatusCode.FAILED_PRECONDITION
    assert not (await get(server, "nan")).pinned
    assert (await failure_of(pin(server, "absent"))).code is grpc.StatusCode.NOT_FOUND


async def test_a_version_that_an_alias_leads_to_is_not_deleted(server: Harness) -> None:
    for alias in ("default", "prod"):
        await server.adapters.SetAlias(pb.SetAliasRequest(adapter="news", alias=alias, version=2))
        failure = await failure_of(delete(server, "news@2"))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert alias in failure.message
        await server.adapters.SetAlias(pb.SetAliasRequest(adapter="news", alias=alias, version=1))
    await delete(server, "news@2")
    await server.adapters.DeleteAlias(pb.DeleteAliasRequest(adapter="news", alias="prod"))
    await delete(server, "news@1")
    failure = await failure_of(server.inference.Classify(classify_request("news", "x")))
    assert failure.code is grpc.StatusCode.NOT_FOUND


async def test_what_cannot_be_deleted_is_said(server: Harness) -> None:
    for adapter, code in (
        ("news", grpc.StatusCode.INVALID_ARGUMENT),
        ("news@default", grpc.StatusCode.INVALID_ARGUMENT),
        ("base@1", grpc.StatusCode.INVALID_ARGUMENT),
        ("acme/base@1", grpc.StatusCode.INVALID_ARGUMENT),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("news@9", grpc.StatusCode.NOT_FOUND),
    ):
        assert (await failure_of(delete(server, adapter))).code is code, adapter


async def test_a_deleted_adapter_leaves_no_trace_for_the_next_of_its_name(many_root: Path, tmp_path: Path) -> None:
    async with running(many_root, state=tmp_path / "state") as server:
        await register(server, "fresh", version=5)
        await pin(server, "fresh@5")
        await pin(server, "fresh@5", False)
        await delete(server, "fresh@5")
    write_adapter(many_root / "fresh" / "7", **LABELS)
    async with running(many_root, state=tmp_path / "state") as server:
        assert await listed(server, name_prefix="fresh") == ["default/fresh@7"]
        await register(server, "fresh", version=5)
        assert (await get(server, "fresh")).version == 7
    async with running(many_root, state=tmp_path / "state") as server:
        assert (await get(server, "fresh")).version == 7


async def test_registrations_and_pins_outlive_a_restart(many_root: Path, tmp_path: Path) -> None:
    async with running(many_root, state=tmp_path / "state") as server:
        kept = await register(server, "fresh", source="sources/kept here/more")
        await pin(server, "acme/news@3")
    write_adapter(many_root / "fresh" / "1", labels=["x", "y", "z"])  # does not replace what was registered
    async with running(many_root, state=tmp_path / "state") as server:
        assert await get(server, "fresh") == kept
        assert (await get(server, "acme/news@3")).pinned
        async with asyncio.timeout(5):
            while (await get(server, "acme/news@3")).state != pb.ADAPTER_STATE_READY:
                await asyncio.sleep(0.01)


async def test_a_repetition_gets_the_first_answer_and_changes_nothing(many_root: Path, tmp_path: Path) -> None:
    registration = pb.RegisterAdapterRequest(name="fresh", source="news/1", request_id="1")
    pinning = pb.PinAdapterRequest(adapter="fresh", pinned=True, request_id="2")
    unpinning = pb.PinAdapterRequest(adapter="fresh", request_id="3")
    moving = pb.SetAliasRequest(adapter="news", alias="prod", version=1, request_id="4")
    removing = pb.DeleteAliasRequest(adapter="news", alias="prod", request_id="5")
    deleting = pb.DeleteAdapterRequest(adapter="fresh@1", request_id="6")
    calls = {
        "RegisterAdapter": (registration,),
        "PinAdapter": (pinning, unpinning),
        "SetAlias": (moving,),
        "DeleteAlias": (removing,),
        "DeleteAdapter": (deleting,),
    }

    async def call_all(server: Harness) -> list[Any]:
        return [await getattr(server.adapters, method)(request) for method in calls for request in calls[method]]

    async with running(many_root, state=tmp_path / "state") as server:
        first = await call_all(server)
        assert first[-1].freed_bytes == RESIDENT_BYTES
        assert await call_all(server) == first
    async with running(many_root, state=tmp_path / "state") as server:
        assert await call_all(server) == first
        assert await listed(server, name_prefix="fresh") == []
        assert [*(await get(server, "news@1")).aliases] == ["default"]
        await check_other_content(server)


async def check_other_content(server: Harness) -> None:
    """An id stands for one call."""
    for call in (
        server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="fresh", source="news/2", request_id="1")),
        server.adapters.PinAdapter(pb.PinAdapterRequest(adapter="news", pinned=True, request_id="1")),
        server.adapters.SetAlias(pb.SetAliasRequest(adapter="news", alias="prod", version=2, request_id="4")),
        server.adapters.DeleteAlias(pb.DeleteAliasRequest(adapter="news", alias="other", request_id="5")),
        server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="news@2", request_id="6")),
    ):
        failure = await failure_of(call)
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request_id")
    other = await register(server, "acme/fresh", request_id="1")  # another tenant's id is another id
    assert other.name == "tenants/acme/adapters/fresh/versions/1"


async def test_concurrent_repetitions_are_one_call(server: Harness) -> None:
    same = await asyncio.gather(*(register(server, "fresh", request_id="once") for _ in range(8)))
    assert {adapter.version for adapter in same} == {1}
    assert await listed(server, name_prefix="fresh") == ["default/fresh@1"]
    deleted = await asyncio.gather(*(delete(server, "fresh@1", request_id="gone") for _ in range(4)))
    assert len({reply.SerializeToString() for reply in deleted}) == 1


async def test_a_call_that_failed_is_tried_again(server: Harness, many_root: Path) -> None:
    assert (await failure_of(register(server, "fresh", source="late", request_id="1"))).field == "source"
    write_adapter(many_root / "late", **LABELS)
    assert (await register(server, "fresh", source="late", request_id="1")).version == 1


@pytest.mark.parametrize("method", ["load", "set_alias"])
async def test_a_caller_that_goes_away_does_not_stop_a_move(
    server: Harness, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    begun, go = hold(monkeypatch, server.engine, method)
    request = pb.SetAliasRequest(adapter="news", alias="prod", version=2, request_id="1")
    call = server.adapters.SetAlias(request)
    moving = asyncio.ensure_future(failure_of_cancelled(call))
    assert await asyncio.to_thread(begun.wait, 5)
    call.cancel()
    await moving
    repeated = asyncio.ensure_future(server.adapters.SetAlias(request).wait_for_connection())
    go.set()
    await repeated
    assert (await server.adapters.SetAlias(request)).alias.version == 2
    assert (await server.inference.Classify(classify_request("news@prod", "x"))).version == 2


async def failure_of_cancelled(call: Any) -> None:
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_caller_that_goes_away_does_not_stop_a_registration(
    many_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = pb.RegisterAdapterRequest(name="fresh", source="news/1", request_id="1")
    async with running(many_root, state=tmp_path / "state") as server:
        begun, go = hold(monkeypatch, server.engine, "register")
        call = server.adapters.RegisterAdapter(request)
        registering = asyncio.ensure_future(failure_of_cancelled(call))
        assert await asyncio.to_thread(begun.wait, 5)
        call.cancel()
        await registering
        go.set()
    async with running(many_root, state=tmp_path / "state") as server:  # the server waited for the change
        assert await listed(server, name_prefix="fresh") == ["default/fresh@1"]
        assert (await server.adapters.RegisterAdapter(request)).adapter.version == 1


async def test_a_store_that_does_not_answer_holds_nobody_else_up(
    server: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Places, "check_url", lambda *_: None)
    monkeypatch.setattr(Fetcher, "resolve", lambda *args: args[2].wait(20))
    hanging = [asyncio.ensure_future(register(server, "slow", source="s3://bucket/a")) for _ in range(40)]
    async with asyncio.timeout(3):
        assert (await register(server, "fresh", request_id="1")).version == 1
        assert (await delete(server, "fresh@1")).freed_bytes == 0
    for call in hanging:
        call.cancel()
    await asyncio.wait(hanging)


async def test_only_allowed_urls_are_asked(many_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a client writes, nothing but a URL below a prefix of the operator is looked at."""
    asked: list[str] = []
    monkeypatch.setattr(Fetcher, "resolve", lambda *args: asked.append(args[1]))
    allowed = ("s3://bucket/team", "hf://org", "https://store.test/adapters/")
    async with running(many_root, sources=allowed) as server:
        for source in (
            "file:///etc",
            "FILE:///etc/passwd",
            "local://etc",
            "http://169.254.169.254/latest/meta-data",
            "http://localhost:9090/metrics",
            "https://store.test/other",
            "https://store.test/adapters/../other",
            "https://store.test/adapters/%2e%2e/other",
            "https://store.test/adapters/%2E%2E%2Fother",
            "https://store.test/adapters/..\\other",
            "https://store.test.evil.test/adapters/a",
            "https://store.test@evil.test/adapters/a",
            "s3://bucket/teams/a",
            "s3://bucket/team/../other",
            "s3://bucket/team/x::file:///etc",
            "s3://bucket",
            "s3://other/team/a",
            "hf://organisation/a",
            "hf://org/../other/a",
            "s3://bucket/team/a\r\nHost: b",
            "simplecache::s3://bucket/team/a",
        ):
            failure = await failure_of(register(server, "fresh", source=source))
            assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "source"), source
        assert await listed(server, name_prefix="fresh") == []
    assert asked == []
