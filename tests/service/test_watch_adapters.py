"""WatchAdapters: what there is, then every change, once and in order, also over a break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.pb.multilora.v1 import adapters_pb2 as pb
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, failure_of, running

NEWS = "tenants/default/adapters/news"


@pytest.fixture
def watched_root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    for folder in ("news/1", "news/2", "acme/tickets/1"):
        write_adapter(root / folder, labels=["a", "b"])
    return root


@pytest.fixture
async def server(watched_root: Path) -> AsyncGenerator[Harness]:
    async with running(watched_root) as harness:
        yield harness


def seen(message: pb.WatchAdaptersResponse) -> tuple[str, str]:
    """What a message is about: its kind, and a name."""
    kind = message.WhichOneof("change")
    value = getattr(message, kind)
    if kind == "adapter":
        return pb.AdapterState.Name(value.state), value.name
    return kind, f"{value.name} → {value.version}" if kind == "alias" else str(value)


class Watch:
    """A stream and the last token that was read from it."""

    def __init__(self, server: Harness, **fields: Any) -> None:
        self.token = ""
        self._call = server.adapters.WatchAdapters(pb.WatchAdaptersRequest(**fields))

    async def next(self, number: int) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        async with asyncio.timeout(5):
            while len(found) < number:
                message = await self._call.read()
                self.token = message.resume_token or self.token
                found.append(seen(message))
        return found

    async def snapshot(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        while not found or found[-1] != ("snapshot_complete", "True"):
            assert not self.token
            found += await self.next(1)
        assert self.token
        return found[:-1]

    async def is_quiet(self) -> bool:
        try:
            async with asyncio.timeout(0.1):
                await self._call.read()
        except TimeoutError:
            return True
        return False

    def cancel(self) -> None:
        self._call.cancel()


async def change_everything(server: Harness) -> list[tuple[str, str]]:
    """What a watcher of the default tenant is to see of it."""
    await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="news", source="news/1"))
    await server.adapters.SetAlias(pb.SetAliasRequest(adapter="news", alias="prod", version=3))
    await server.adapters.DeleteAlias(pb.DeleteAliasRequest(adapter="news", alias="prod"))
    await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="news@3"))
    await server.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="fresh", source="news/1"))
    await server.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="fresh@1"))
    fresh = "tenants/default/adapters/fresh"
    return [
        ("ADAPTER_STATE_REGISTERED", f"{NEWS}/versions/3"),
        ("ADAPTER_STATE_READY", f"{NEWS}/versions/3"),
        ("alias", f"{NEWS}/aliases/prod → 3"),
        ("deleted_alias", f"{NEWS}/aliases/prod"),
        ("deleted_adapter", f"{NEWS}/versions/3"),
        ("ADAPTER_STATE_REGISTERED", f"{fresh}/versions/1"),
        ("alias", f"{fresh}/aliases/default → 1"),
        ("deleted_alias", f"{fresh}/aliases/default"),
        ("deleted_adapter", f"{fresh}/versions/1"),
    ]


async def test_a_watcher_sees_what_there_is_and_then_what_changes(server: Harness) -> None:
    watch = Watch(server)
    assert await watch.snapshot() == [
        ("ADAPTER_STATE_REGISTERED", f"{NEWS}/versions/1"),
        ("ADAPTER_STATE_REGISTERED", f"{NEWS}/versions/2"),
        ("alias", f"{NEWS}/aliases/default → 1"),
    ]
    expected = await change_everything(server)
    assert await watch.next(len(expected)) == expected
    assert await watch.is_quiet()


async def test_a_watcher_that_resumes_gets_what_it_missed_and_no_more(server: Harness) -> None:
    first = Watch(server)
    await first.snapshot()
    expected = await change_everything(server)
    assert await first.next(4) == expected[:4]
    first.cancel()
    second = Watch(server, resume_token=first.token)
    assert await second.next(len(expected) - 4) == expected[4:]
    third = Watch(server, resume_token=second.token)
    assert await third.is_quiet()


async def test_a_watcher_of_a_tenant_sees_no_other(server: Harness) -> None:
    acme, everybody = Watch(server, tenant="acme"), Watch(server, tenant="-")
    tickets = "tenants/acme/adapters/tickets"
    assert await acme.snapshot() == [
        ("ADAPTER_STATE_REGISTERED", f"{tickets}/versions/1"),
        ("alias", f"{tickets}/aliases/default → 1"),
    ]
    assert len(await everybody.snapshot()) == 5
    expected = await change_everything(server)
    await server.adapters.SetAlias(pb.SetAliasRequest(adapter="acme/tickets", alias="prod", version=1))
    theirs = [("ADAPTER_STATE_READY", f"{tickets}/versions/1"), ("alias", f"{tickets}/aliases/prod → 1")]
    assert await acme.next(2) == theirs
    assert await everybody.next(len(expected) + 2) == [*expected, *theirs]


async def test_a_token_from_before_a_restart_begins_with_what_there_is(watched_root: Path) -> None:
    async with running(watched_root) as server:
        watch = Watch(server)
        await watch.snapshot()
        watch.cancel()
    async with running(watched_root) as server:
        assert len(await Watch(server, resume_token=watch.token).snapshot()) == 3


async def test_what_is_no_token_is_refused(server: Harness) -> None:
    call = server.adapters.WatchAdapters(pb.WatchAdaptersRequest(resume_token="x"))
    failure = await failure_of(call.read())
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "resume_token")


async def test_a_watcher_does_not_hold_the_server_up_when_it_stops(watched_root: Path) -> None:
    async with running(watched_root, grace=5.0) as server:
        call = server.adapters.WatchAdapters(pb.WatchAdaptersRequest())
        while not (await call.read()).snapshot_complete:
            pass
        ending = asyncio.ensure_future(failure_of(call.read()))
        started = time.monotonic()
        server.stop.set()
        assert (await ending).code is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - started < 2.5
