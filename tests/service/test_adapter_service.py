"""AdapterService, as a client sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from server.pb.multilora.v1 import adapters_pb2 as pb
from server.pb.multilora.v1 import common_pb2
from tests.service.fake_runtime import DIGEST, RESIDENT_BYTES, write_adapter
from tests.service.harness import Harness, classify_request, failure_of, running


async def get(server: Harness, adapter: str) -> pb.Adapter:
    return (await server.adapters.GetAdapter(pb.GetAdapterRequest(adapter=adapter))).adapter


async def test_a_registered_adapter_is_described_before_it_is_loaded(server: Harness) -> None:
    adapter = await get(server, "short")
    assert adapter.name == "tenants/default/adapters/short/versions/1"
    assert adapter.state == pb.ADAPTER_STATE_REGISTERED
    assert adapter.task == common_pb2.TASK_CLASSIFY
    assert adapter.problem_type == common_pb2.PROBLEM_TYPE_SINGLE_LABEL
    assert list(adapter.labels) == ["no", "yes"]
    assert (adapter.max_length, adapter.digest, adapter.resident_bytes) == (6, "", 0)
    assert dict(adapter.metrics) == {"accuracy": 0.9}
    assert not adapter.HasField("load_seconds")
    assert not adapter.HasField("failure")


async def test_a_refused_folder_is_listed_with_its_reason(server: Harness) -> None:
    adapter = await get(server, "garbled")
    assert adapter.state == pb.ADAPTER_STATE_FAILED
    assert adapter.failure.reason == "ADAPTER_REJECTED"
    assert "adapter_config.json" in adapter.failure.message
    assert adapter.task == common_pb2.TASK_UNSPECIFIED


async def test_loading_and_waiting_answers_with_a_ready_adapter(server: Harness) -> None:
    request = pb.LoadAdapterRequest(adapter="spam", wait=True)
    adapter = (await server.adapters.LoadAdapter(request)).adapter
    assert adapter.state == pb.ADAPTER_STATE_READY
    assert (adapter.digest, adapter.resident_bytes, list(adapter.ranks)) == (DIGEST, RESIDENT_BYTES, [8])
    assert adapter.load_seconds > 0


async def test_loading_without_waiting_answers_at_once(server: Harness) -> None:
    adapter = (await server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="spam"))).adapter
    assert adapter.name.endswith("/spam/versions/1")
    async with asyncio.timeout(5):
        while (await get(server, "spam")).state != pb.ADAPTER_STATE_READY:
            await asyncio.sleep(0.01)


async def test_a_load_that_is_refused_says_why_and_is_remembered(server: Harness) -> None:
    failure = await failure_of(server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="nan", wait=True)))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "NaN" in failure.message
    assert (await get(server, "nan")).failure.message in failure.message


async def test_unloading_tells_what_it_freed_and_the_next_request_loads_again(server: Harness) -> None:
    await server.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="spam", wait=True))
    unload = pb.UnloadAdapterRequest(adapter="spam")
    first = await server.adapters.UnloadAdapter(unload)
    second = await server.adapters.UnloadAdapter(unload)
    assert (first.freed_bytes, second.freed_bytes) == (RESIDENT_BYTES, 0)
    assert first.adapter.state == pb.ADAPTER_STATE_REGISTERED
    assert (await server.inference.Classify(classify_request("spam", "one"))).version == 1


@pytest.mark.parametrize("method", ["GetAdapter", "LoadAdapter", "UnloadAdapter"])
@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("absent", grpc.StatusCode.NOT_FOUND),
        ("spam@2", grpc.StatusCode.NOT_FOUND),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("spam@one", grpc.StatusCode.NOT_FOUND),  # an alias that it does not have
        ("spam@1one", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_wrong_reference_is_named(server: Harness, method: str, reference: str, code: grpc.StatusCode) -> None:
    request = getattr(pb, f"{method}Request")(adapter=reference)
    failure = await failure_of(getattr(server.adapters, method)(request))
    assert failure.code is code
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        assert failure.field == "adapter"


async def test_a_new_version_takes_the_next_number_and_the_old_one_stays_the_default(
    server: Harness, adapter_root: Path
) -> None:
    write_adapter(adapter_root / "more" / "spam-v2", labels=["ham", "spam", "scam"])
    request = pb.RegisterAdapterRequest(name="spam", source="more/spam-v2")
    adapter = (await server.adapters.RegisterAdapter(request)).adapter
    assert adapter.name == "tenants/default/adapters/spam/versions/2"
    assert list(adapter.labels) == ["ham", "spam", "scam"]
    assert (await server.inference.Classify(classify_request("spam", "one"))).version == 1
    newer = await server.inference.Classify(classify_request("spam@2", "one"))
    assert (newer.version, len(newer.results[0].scores)) == (2, 3)


async def test_concurrent_registrations_get_versions_of_their_own(server: Harness) -> None:
    request = pb.RegisterAdapterRequest(name="fresh", source="spam")
    replies = await asyncio.gather(*(server.adapters.RegisterAdapter(request) for _ in range(8)))
    assert sorted(reply.adapter.version for reply in replies) == list(range(1, 9))


async def test_a_version_cannot_be_registered_twice(server: Harness) -> None:
    request = pb.RegisterAdapterRequest(name="spam", version=1, source="spam")
    failure = await failure_of(server.adapters.RegisterAdapter(request))
    assert failure.code is grpc.StatusCode.ALREADY_EXISTS
    assert "default/spam@1" in failure.message


async def test_registering_refused_files_says_which_and_lists_nothing(server: Harness) -> None:
    request = pb.RegisterAdapterRequest(name="garbled-again", source="garbled")
    failure = await failure_of(server.adapters.RegisterAdapter(request))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.info.metadata["where"] == "adapter_config.json"
    failure = await failure_of(server.adapters.GetAdapter(pb.GetAdapterRequest(adapter="garbled-again")))
    assert failure.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.RegisterAdapterRequest(name="", source="spam"), "name"),
        (pb.RegisterAdapterRequest(name="a/b/c", source="spam"), "name"),
        (pb.RegisterAdapterRequest(name="a@1", source="spam"), "name"),
        (pb.RegisterAdapterRequest(name="base", source="spam"), "name"),
        (pb.RegisterAdapterRequest(name="new", source="spam", version=0), "version"),
        (pb.RegisterAdapterRequest(name="new", source="spam", version=2_000_000_000), "version"),
        (pb.RegisterAdapterRequest(name="new"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="."), "source"),
        (pb.RegisterAdapterRequest(name="new", source="/etc"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="../adapters/spam"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="spam/../../outside"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="absent"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="spam/adapter_config.json"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="spam\0"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="x" * 5000), "source"),
        (pb.RegisterAdapterRequest(name="new", source="link"), "source"),
        (pb.RegisterAdapterRequest(name="new", source="loop"), "source"),
    ],
)
async def test_a_wrong_registration_names_its_field(
    server: Harness, adapter_root: Path, request_: pb.RegisterAdapterRequest, field: str
) -> None:
    write_adapter(adapter_root.parent / "outside", labels=["a", "b"])
    (adapter_root / "link").symlink_to(adapter_root.parent / "outside")
    (adapter_root / "loop").symlink_to(adapter_root / "loop")
    failure = await failure_of(server.adapters.RegisterAdapter(request_))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.field == field
    assert str(adapter_root.parent) not in failure.message


async def test_pages_cover_every_adapter_once(server: Harness) -> None:
    names: list[str] = []
    token = ""
    while True:
        page = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2, page_token=token))
        assert len(page.adapters) <= 2
        names += [adapter.name.split("/")[3] for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert names == ["garbled", "nan", "short", "spam", "topics"]


async def test_a_page_goes_on_where_the_last_one_ended_though_adapters_were_added(server: Harness) -> None:
    first = await server.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=3))
    await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="aaa", source="spam"))
    request = pb.ListAdaptersRequest(page_token=first.next_page_token)
    rest = await server.adapters.ListAdapters(request)
    assert [adapter.name.split("/")[3] for adapter in rest.adapters] == ["spam", "topics"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ListAdaptersRequest(page_size=-1), "page_size"),
        (pb.ListAdaptersRequest(page_size=1001), "page_size"),
        (pb.ListAdaptersRequest(page_token="!"), "page_token"),
        (pb.ListAdaptersRequest(page_token="c3BhbQ=="), "page_token"),
        (pb.ListAdaptersRequest(page_token="/w=="), "page_token"),
    ],
)
async def test_a_wrong_page_is_named(server: Harness, request_: pb.ListAdaptersRequest, field: str) -> None:
    failure = await failure_of(server.adapters.ListAdapters(request_))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_folder_whose_name_is_no_adapter_name_is_skipped(adapter_root: Path) -> None:
    write_adapter(adapter_root / "not a name", labels=["a", "b"])
    write_adapter(adapter_root / "base", labels=["a", "b"])
    async with running(adapter_root) as server:
        page = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert [adapter.name.split("/")[3] for adapter in page.adapters] == [*("garbled", "nan", "short", "spam", "topics")]
