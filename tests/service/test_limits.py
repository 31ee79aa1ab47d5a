"""Limits of a tenant, as its clients meet them: refused at once, before any work, with the limit and when to retry."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.tenancy.model import Role
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, classify_request, failure_of, question_request
from tests.service.tenants import INFERENCE, Caller, Door, code_of, guarded, make_door, request_for, until

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
OK = grpc.StatusCode.OK
SHARE = '[[share]]\nadapter = "acme/spam"\nwith = ["bolt"]'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    for folder in ("acme/spam/1", "acme/cold/1", "bolt/spam/1"):
        write_adapter(root / folder, labels=["ham", "spam"])
    write_adapter(root / "acme" / "reader" / "1", task="answer", labels=[])
    return root


class World:
    """A server, its files, and callers of two tenants and an operator."""

    def __init__(self, server: Harness, door: Door, callers: dict[str, Caller]) -> None:
        self.server, self.engine, self.door = server, server.engine, door
        self.acme, self.bolt, self.operator = callers["acme"], callers["bolt"], callers["operator"]

    def ask(self, *texts: str, **fields: Any) -> Any:
        return self.acme("Classify", classify_request("spam", *texts or ("x",), **fields))

    @asynccontextmanager
    async def held(self, *texts: str, caller: Caller | None = None) -> AsyncGenerator[None]:
        """A request that is inside the server for the block."""
        num_before = len(self.engine.submitted)
        self.engine.gate.clear()
        call = (caller or self.acme)("Classify", classify_request("spam", *texts or ("x",)))
        waiting = asyncio.ensure_future(code_of(call))
        async with asyncio.timeout(5):
            while len(self.engine.submitted) == num_before:
                await asyncio.sleep(0.005)
        try:
            yield
        finally:
            self.engine.gate.set()
            assert await waiting is OK


@asynccontextmanager
async def limited(root: Path, limits: str, **settings: Any) -> AsyncGenerator[World]:
    door = make_door(root.parent / "door", SHARE, "[tenants.acme]", limits)
    keys = [
        ("acme", "acme", (Role.INFER, Role.ADAPTERS)),
        ("bolt", "bolt", (Role.INFER,)),
        ("operator", "ops", (Role.OPERATOR,)),
    ]
    async with guarded(root, door, keys, **settings) as (server, callers):
        yield World(server, door, callers)


async def refusal(world: World, call: Any, limit: str, *, can_wait: bool = True) -> float:
    """Check that a call is refused by `limit`, at once and before any work; the seconds to wait."""
    assert world.server.runtime is not None
    world.server.runtime.encoder_threads.clear()
    before = len(world.engine.submitted), len(world.engine.prefetched)
    async with asyncio.timeout(2):
        failure = await failure_of(call)
    assert (failure.code, failure.info.reason) == (FULL, "QUOTA_EXCEEDED")
    assert failure.quota == ("tenants/acme", limit)
    assert dict(failure.info.metadata)["quota"] == limit.split(" ")[0]
    assert world.server.runtime.encoder_threads == set()
    assert (len(world.engine.submitted), len(world.engine.prefetched)) == before
    if not can_wait:
        assert failure.retry_after_s is None
        assert "waiting does not help" in failure.message
        return 0.0
    assert failure.retry_after_s is not None and failure.retry_after_s > 0
    return failure.retry_after_s


async def test_requests_per_second(root: Path) -> None:
    async with limited(root, "requests_per_second = 2") as world:
        assert [await code_of(world.ask()) for _ in range(2)] == [OK, OK]
        cold = world.acme("Classify", classify_request("cold", "x"))
        wait_s = await refusal(world, cold, "requests_per_second = 2")
        assert wait_s <= 0.5
        assert await code_of(world.bolt("Classify", classify_request("spam", "x"))) is OK
        await asyncio.sleep(wait_s)
        assert await code_of(world.ask()) is OK  # who waits as long as told is answered


async def test_tokens_per_minute(root: Path) -> None:
    async with limited(root, "tokens_per_minute = 60") as world:
        many = "a b c d e f g h i j k l m n"  # 16 tokens with the special ones
        assert await code_of(world.ask(many, many, many, many)) is OK  # 64: into debt
        wait_s = await refusal(world, world.ask("x"), "tokens_per_minute = 60")
        assert 1 < wait_s < 10
        assert await code_of(world.bolt("Classify", classify_request("acme/spam", "x"))) is OK  # pays for itself


async def test_the_estimate_of_tokens_is_settled_once_they_are_counted(root: Path) -> None:
    async with limited(root, "tokens_per_minute = 60") as world:
        long_word = "a" * 200  # taken for 51 tokens, and is 3
        assert [await code_of(world.ask(long_word)) for _ in range(3)] == [OK] * 3
        many = "a b c d e f g h i j k l m n"  # taken for 8 tokens, and is 16
        answered = 0
        while await code_of(world.ask(many)) is OK:
            answered += 1
        assert answered == 3  # 51 are left: two take 32, the third has 19 for its estimate, and then there are 3


async def test_concurrent_requests(root: Path) -> None:
    async with limited(root, "max_concurrent_requests = 1") as world:
        async with world.held():
            await refusal(world, world.ask(), "max_concurrent_requests = 1")
            cold = world.acme("Classify", classify_request("cold", "x"))
            await refusal(world, cold, "max_concurrent_requests = 1")
        assert await code_of(world.ask()) is OK


async def test_queued_sequences(root: Path) -> None:
    async with limited(root, "max_queued_sequences = 4") as world:
        limit = "max_queued_sequences = 4"
        await refusal(world, world.ask(*"abcde"), limit, can_wait=False)
        async with world.held("a", "b", "c"):
            await refusal(world, world.ask("a", "b"), limit)
        assert await code_of(world.ask(*"abcd")) is OK


async def test_windows_of_a_long_text_count_once_they_are_known(root: Path) -> None:
    async with limited(root, "max_queued_sequences = 5\ntokens_per_minute = 600") as world:

        def read(num_words: int) -> Any:
            request = question_request("reader", ("q", " ".join("abcdefghij"[n % 10] for n in range(num_words))))
            return world.acme("AnswerQuestion", request)

        assert await code_of(read(40)) is OK  # 4 windows
        failure = await failure_of(read(70))  # 7 windows
        assert failure.quota == ("tenants/acme", "max_queued_sequences = 5")
        assert failure.retry_after_s is None
        async with world.held("a", "b"):
            failure = await failure_of(read(40))
            assert failure.quota is not None and failure.retry_after_s is not None
        assert await code_of(world.ask(*"abcde")) is OK


async def test_each_tenant_has_its_own_limits_and_others_have_the_default(root: Path) -> None:
    async with limited(root, "max_concurrent_requests = 1\n[default]\nmax_queued_sequences = 2") as world:
        async with world.held():
            await refusal(world, world.ask(), "max_concurrent_requests = 1")
            failure = await failure_of(world.bolt("Classify", classify_request("spam", *"abc")))
            assert failure.quota == ("tenants/bolt", "max_queued_sequences = 2")
            # whose adapter it is does not matter, nor what an operator does for others
            for caller in (world.bolt, world.operator):
                asked = asyncio.ensure_future(code_of(caller("Classify", classify_request("acme/spam", "a"))))
                await asyncio.sleep(0.05)
                assert not asked.done()
        assert world.engine.submitted[-1].tenant == "ops"


async def test_limits_change_without_a_restart(root: Path) -> None:
    async with limited(root, "max_queued_sequences = 2") as world:
        assert await code_of(world.ask(*"abc")) is FULL

        async def is_allowed() -> bool:
            return await code_of(world.ask(*"abc")) is OK

        async def is_refused() -> bool:
            return not await is_allowed()

        world.door.write("[tenants.acme]", "max_queued_sequences = 3")
        await until(is_allowed)
        world.door.write("[tenants.acme]", "requests_per_second = 0.001")
        await until(is_refused)
        world.door.write()
        await until(is_allowed)


async def test_a_refused_request_is_not_charged(root: Path) -> None:
    """Neither one that another limit refuses, nor one for which the server itself has no room."""
    limits = "max_concurrent_requests = 3\nrequests_per_second = 5\ntokens_per_minute = 100\nmax_queued_sequences = 6"
    async with limited(root, limits, max_inputs=8, max_queued_sequences=8) as world:
        async with world.held("a", "b", "c", "d"):
            for _ in range(30):
                assert await code_of(world.ask("a", "b", "c")) is FULL
        async with world.held(*"abcdef", caller=world.bolt):
            for _ in range(30):
                failure = await failure_of(world.ask("a", "b", "c"))
                assert (failure.code, failure.info.reason) == (FULL, "CAPACITY_EXCEEDED")
        assert [await code_of(world.ask("a", "b", "c")) for _ in range(4)] == [OK] * 4


@pytest.mark.parametrize("method", INFERENCE)
async def test_a_priority_is_one_of_four(root: Path, method: str) -> None:
    async with limited(root, "max_concurrent_requests = 9") as world:
        for priority in (-1, 4, 2**31 - 1):
            failure = await failure_of(world.acme(method, request_for(method, "spam", priority=priority)))
            assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "priority")
        assert world.engine.submitted == []
        for priority in range(4):
            await code_of(world.acme(method, request_for(method, "base", priority=priority)))
        assert [request.priority for request in world.engine.submitted] == ([*range(4)] if method == "Embed" else [])


async def flicker(gates: list[Any], chance: random.Random) -> None:
    """Hold tokenising and answers up for random moments."""
    while True:
        for gate in gates:
            (gate.set if chance.random() < 0.6 else gate.clear)()
        await asyncio.sleep(chance.random() * 0.01)


async def cancelled(caller: Caller, request: Any, seconds: float) -> bool:
    """Whether the caller left before the reply."""
    call = caller.start("Classify", request)
    await asyncio.sleep(seconds)
    return call.cancel()


async def expired(caller: Caller, request: Any, seconds: float) -> bool:
    """Whether the deadline passed before the reply."""
    return await code_of(caller.start("Classify", request, timeout=seconds)) is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("leave", [cancelled, expired])
async def test_nothing_is_held_for_callers_that_left(
    root: Path, leave: Callable[[Caller, Any, float], Awaitable[bool]]
) -> None:
    """200 of them, in whatever phase they were: afterwards every permit of each tenant can be had again."""
    limits = "max_concurrent_requests = 40\nmax_queued_sequences = 80"
    async with limited(root, f"{limits}\n[tenants.bolt]\n{limits}") as world:
        runtime, chance = world.server.runtime, random.Random(7)
        assert runtime is not None
        flickering = asyncio.create_task(flicker([runtime.tokenizer_gate, runtime.engine.gate], chance))
        num_left = 0
        while num_left < 200:
            requests = [
                (caller, classify_request(adapter, "a", "b"))
                for caller, adapter in ((world.acme, "spam"), (world.acme, "cold"), (world.bolt, "spam"))
                for _ in range(10)
            ]
            num_left += sum(await asyncio.gather(*(leave(*request, chance.random() * 0.03) for request in requests)))
        flickering.cancel()
        runtime.tokenizer_gate.set()
        runtime.engine.gate.set()
        await world.server.until_admitted(0)
        for caller, tenant in ((world.acme, "acme"), (world.bolt, "bolt")):
            await check_all_are_free(world, caller, tenant)


async def check_all_are_free(world: World, caller: Caller, tenant: str) -> None:
    world.engine.gate.clear()
    request = classify_request("spam", "a", "b")
    calls = [asyncio.ensure_future(code_of(caller("Classify", request))) for _ in range(40)]
    await world.server.until_admitted(80)
    failure = await failure_of(caller("Classify", request))
    assert failure.quota == (f"tenants/{tenant}", "max_concurrent_requests = 40")
    world.engine.gate.set()
    assert await asyncio.gather(*calls) == [OK] * 40
    await world.server.until_admitted(0)
