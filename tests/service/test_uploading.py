"""UploadAdapter: a whole adapter arrives and is served, or nothing of it is seen or kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.control.state import StateStore, StateUnavailable
from server.control.uploads import Upload, UploadReceiver
from server.pb.multilora.v1 import adapters_pb2 as pb
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, classify_request, failure_of, running

CONFIG = json.dumps({"labels": ["a", "b"]}).encode()
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": bytes(range(256)) * 1024, "empty.txt": b""}
Messages = list[pb.UploadAdapterRequest]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapters" / "spam", labels=["a", "b"])
    return tmp_path / "adapters"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
async def server(root: Path, state: Path) -> AsyncGenerator[Harness]:
    async with running(root, state=state, max_upload_mib=1) as harness:
        yield harness


def header(files: dict[str, bytes], name: str = "news", **fields: Any) -> pb.UploadAdapterRequest:
    declared = [
        pb.UploadFile(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in files.items()
    ]
    return pb.UploadAdapterRequest(header=pb.UploadHeader(name=name, files=declared, **fields))


def pieces(data: bytes, size: int = 100_000) -> Messages:
    return [pb.UploadAdapterRequest(data=data[at : at + size]) for at in range(0, len(data), size)]


def messages(files: dict[str, bytes] = FILES, name: str = "news", **fields: Any) -> Messages:
    return [header(files, name, **fields), *pieces(b"".join(files.values()))]


def upload(server: Harness, sent: Messages) -> Any:
    def stream() -> Iterator[pb.UploadAdapterRequest]:
        yield from sent

    return server.adapters.UploadAdapter(stream())


def stored(state: Path) -> dict[str, bytes]:
    """Everything of uploads that is on disk, finished or not."""
    paths = [path for part in ("adapters", "incoming") for path in (state / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(state)): path.read_bytes() for path in paths}


async def until_nothing_is_kept(state: Path) -> None:
    async with asyncio.timeout(3):
        while stored(state) or [*(state / "incoming").glob("*")]:
            await asyncio.sleep(0.01)


async def is_listed(server: Harness, adapter: str) -> bool:
    page = await server.adapters.ListAdapters(pb.ListAdaptersRequest(tenant="-", name_prefix=adapter))
    return bool(page.adapters)


async def begin(server: Harness, sent: Messages) -> Any:
    """A call that has sent some messages, and is not done."""
    call = server.adapters.UploadAdapter()
    for message in sent:
        await call.write(message)
    return call


async def until_bytes_arrive(state: Path) -> None:
    async with asyncio.timeout(3):
        while not any((state / "incoming").glob("*/*")):
            await asyncio.sleep(0.01)


async def test_an_upload_is_served_also_after_a_restart(root: Path, state: Path) -> None:
    async with running(root, state=state) as server:
        adapter = (await upload(server, messages(name="acme/news"))).adapter
        assert (adapter.name, adapter.source) == ("tenants/acme/adapters/news/versions/1", "upload")
        assert (adapter.state, list(adapter.labels)) == (pb.ADAPTER_STATE_REGISTERED, ["a", "b"])
        assert stored(state) == {f"adapters/acme/news/1/{name}": data for name, data in FILES.items()}
        assert (await server.inference.Classify(classify_request("acme/news", "x"))).version == 1
        assert (await upload(server, messages(name="acme/news"))).adapter.version == 2
    async with running(root, state=state) as server:
        assert (await server.inference.Classify(classify_request("acme/news@2", "x"))).version == 2
        shown = (await server.adapters.GetAdapter(pb.GetAdapterRequest(adapter="acme/news"))).adapter
        assert (shown.version, shown.source) == (1, "upload")


async def test_deleting_an_upload_frees_its_files(server: Harness, state: Path) -> None:
    await upload(server, messages())
    request = pb.DeleteAdapterRequest(adapter="news@1", request_id="1")
    deleted = await server.adapters.DeleteAdapter(request)
    assert deleted.freed_disk_bytes == sum(map(len, FILES.values()))
    assert await server.adapters.DeleteAdapter(request) == deleted
    await until_nothing_is_kept(state)
    assert (await upload(server, messages())).adapter.version == 1


SWAPPED = dict(reversed(FILES.items()))
WRONG: dict[str, tuple[Messages, str]] = {
    "no message at all": ([], "header"),
    "bytes first": (pieces(b"x"), "header"),
    "an empty message": ([pb.UploadAdapterRequest()], "header"),
    "the header twice": ([header(FILES), header(FILES)], "data"),
    "an empty message later": ([header(FILES), pb.UploadAdapterRequest()], "data"),
    "another content": ([header(FILES), *pieces(bytes(len(b"".join(FILES.values()))))], "header.files[0].sha256"),
    "another order": ([header(SWAPPED), *pieces(b"".join(FILES.values()))], "header.files[1].sha256"),
    "too few bytes": (messages()[:-1], "data"),
    "no bytes": (messages()[:1], "data"),
    "too many bytes": ([*messages(), *pieces(b"x")], "data"),
    "no files": ([header({})], "header.files"),
    "a folder above": ([header({"../adapter_config.json": b"{}"})], "header.files[0].path"),
    "no config": ([header({"adapter_model.safetensors": b"x"}), *pieces(b"x")], "header.files"),
    "no name": (messages(name=""), "header.name"),
    "the base's name": (messages(name="base"), "header.name"),
    "version 0": (messages(version=0), "header.version"),
}


async def test_a_wrong_upload_names_its_field_and_leaves_nothing(server: Harness, state: Path) -> None:
    for what, (sent, field) in WRONG.items():
        failure = await failure_of(upload(server, sent))
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field), what
        assert not await is_listed(server, "news"), what
        await until_nothing_is_kept(state)
    assert (await upload(server, messages())).adapter.version == 1


async def test_one_that_is_too_large_is_refused_before_its_bytes(server: Harness, state: Path) -> None:
    failure = await failure_of(upload(server, [header({"adapter_config.json": bytes(1 + (1 << 20))})]))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "--max-upload-mib" in failure.message
    await until_nothing_is_kept(state)


async def test_a_refused_adapter_leaves_nothing(server: Harness, state: Path) -> None:
    sent = messages(FILES | {"adapter_config.json": b"{not json"}, request_id="1")
    for _ in range(2):
        failure = await failure_of(upload(server, sent))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert failure.info.metadata["where"] == "adapter_config.json"
        assert not await is_listed(server, "news")
        await until_nothing_is_kept(state)


async def test_what_cannot_be_kept_is_not_there(server: Harness, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StateUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "commit", full)
        failure = await failure_of(upload(server, messages(request_id="1")))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert not await is_listed(server, "news")
    await until_nothing_is_kept(state)
    assert (await upload(server, messages(request_id="1"))).adapter.version == 1


async def test_nothing_is_seen_before_the_last_byte(server: Harness, state: Path) -> None:
    call = await begin(server, messages()[:-1])
    await until_bytes_arrive(state)
    assert not await is_listed(server, "news")
    assert not any(path.startswith("adapters/") for path in stored(state))
    await call.write(messages()[-1])
    await call.done_writing()
    assert (await call).adapter.version == 1
    assert len(stored(state)) == len(FILES)


@pytest.mark.parametrize("num_sent", [1, 2])
async def test_a_client_that_goes_away_leaves_nothing_and_may_come_back(
    server: Harness, state: Path, num_sent: int
) -> None:
    call = await begin(server, messages(request_id="1")[:num_sent])
    if num_sent > 1:
        await until_bytes_arrive(state)
    started = time.monotonic()
    call.cancel()
    await until_nothing_is_kept(state)
    assert not await is_listed(server, "news")
    assert (await upload(server, messages(request_id="1"))).adapter.version == 1
    assert time.monotonic() - started < 3, "the second call waited for the first"
    assert len(stored(state)) == len(FILES)


async def test_a_client_that_goes_away_after_the_last_byte_has_uploaded_all_or_nothing(
    server: Harness, state: Path
) -> None:
    call = await begin(server, messages(request_id="1"))
    await until_bytes_arrive(state)
    call.cancel()
    assert (await upload(server, messages(request_id="1"))).adapter.version == 1
    assert stored(state) == {f"adapters/default/news/1/{name}": data for name, data in FILES.items()}


async def test_a_client_that_goes_away_before_the_first_file_is_begun_leaves_nothing(
    server: Harness, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    original = UploadReceiver.begin

    def slow(receiver: UploadReceiver, header: pb.UploadHeader) -> Upload:
        begun.set()
        go.wait(5)
        return original(receiver, header)

    monkeypatch.setattr(UploadReceiver, "begin", slow)
    call = await begin(server, messages())
    assert await asyncio.to_thread(begun.wait, 5)
    call.cancel()
    await asyncio.sleep(0.05)
    go.set()
    await asyncio.sleep(0.05)
    await until_nothing_is_kept(state)
    assert not await is_listed(server, "news")


async def test_a_client_that_stalls_is_told_and_leaves_nothing(
    server: Harness, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rpc.uploading._STALLED_S", 0.1)
    for num_sent in (0, 1, 2):
        failure = await failure_of(await begin(server, messages()[:num_sent]))
        assert failure.code is grpc.StatusCode.ABORTED
        assert "0.1 seconds" in failure.message
        await until_nothing_is_kept(state)
    assert not await is_listed(server, "news")


async def test_a_repetition_gets_the_first_answer(root: Path, state: Path) -> None:
    async with running(root, state=state) as server:
        first = await upload(server, messages(request_id="1"))
        assert await upload(server, messages(request_id="1")) == first
        assert await upload(server, messages(request_id="1")[:1]) == first
    async with running(root, state=state) as server:
        assert await upload(server, messages(request_id="1")) == first
        assert len(stored(state)) == len(FILES)
        other = messages(FILES | {"README.md": b"other"}, request_id="1")
        assert (await failure_of(upload(server, other))).field == "header.request_id"
        assert len(stored(state)) == len(FILES)


@pytest.mark.parametrize("request_id", ["x" * 129, "used"])
async def test_a_wrong_request_id_is_named_by_its_place_in_the_header(server: Harness, request_id: str) -> None:
    await upload(server, messages(name="other", request_id="used"))
    failure = await failure_of(upload(server, messages(request_id=request_id)))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "header.request_id")


async def test_repetitions_at_once_are_one_upload(server: Harness, state: Path) -> None:
    replies = await asyncio.gather(*(upload(server, messages(request_id="1")) for _ in range(4)))
    assert [reply.adapter.version for reply in replies] == [1] * 4
    assert len(stored(state)) == len(FILES)


async def test_of_two_uploads_of_one_version_one_wins(server: Harness, state: Path) -> None:
    contents = [FILES | {"README.md": str(number).encode()} for number in range(4)]
    calls = [upload(server, messages(files, version=7)) for files in contents]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    won = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, pb.UploadAdapterResponse)]
    lost = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(won) == 1
    assert [error.code() for error in lost] == [grpc.StatusCode.ALREADY_EXISTS] * 3
    assert stored(state) == {f"adapters/default/news/7/{name}": data for name, data in contents[won[0]].items()}
    assert (await server.inference.Classify(classify_request("news", "x"))).version == 7


async def test_uploads_at_once_without_a_version_get_one_each(server: Harness) -> None:
    replies = await asyncio.gather(*(upload(server, messages()) for _ in range(4)))
    assert sorted(reply.adapter.version for reply in replies) == [1, 2, 3, 4]


async def test_a_version_that_is_taken_stays_as_it_is(server: Harness, state: Path) -> None:
    await upload(server, messages())
    for name in ("news", "spam"):
        other = messages(FILES | {"README.md": b"other"}, name, version=1)
        assert (await failure_of(upload(server, other))).code is grpc.StatusCode.ALREADY_EXISTS
        told_at_once = await begin(server, other[:1])
        assert (await failure_of(told_at_once)).code is grpc.StatusCode.ALREADY_EXISTS
    assert stored(state) == {f"adapters/default/news/1/{name}": data for name, data in FILES.items()}


async def test_more_uploads_than_the_server_takes_are_told_to_wait(server: Harness, state: Path) -> None:
    held = [await begin(server, messages()[:2]) for _ in range(4)]
    async with asyncio.timeout(3):
        while len([*(state / "incoming").glob("*")]) < 4:
            await asyncio.sleep(0.01)
    failure = await failure_of(upload(server, messages()))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.retry_after_s == 2.0
    for call in held:
        call.cancel()
    await until_nothing_is_kept(state)
    assert (await upload(server, messages())).adapter.version == 1


async def test_a_server_without_a_state_directory_takes_no_uploads(root: Path) -> None:
    async with running(root) as server:
        failure = await failure_of(upload(server, messages()))
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UPLOADS_DISABLED")
        assert "--state" in failure.message
