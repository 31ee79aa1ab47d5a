"""Those who watch see every change once and in order, or are told that they missed some."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterId, AdapterInfo, AdapterState, Alias
from server.control.events import (
    AdapterChanged,
    AdapterDeleted,
    AliasChanged,
    AliasDeleted,
    Event,
    EventLog,
    WatchTooSlow,
)


def deleted(version: int, tenant: str = "default") -> AdapterDeleted:
    return AdapterDeleted(AdapterId(tenant, "news", version))


async def take(events: AsyncGenerator[tuple[int, Event]], count: int) -> list[tuple[int, Event]]:
    async with asyncio.timeout(10):
        return [await anext(events) for _ in range(count)]


async def all_wait(log: EventLog, count: int) -> None:
    async with asyncio.timeout(10):
        while log.num_waiting != count:
            await asyncio.sleep(0)


async def test_a_follower_gets_what_there_is_and_what_comes() -> None:
    log = EventLog()
    info = AdapterInfo(AdapterId("default", "news", 1), "news", None, AdapterState.READY, None)
    alias = Alias("default", "news", "prod", 1)
    events: list[Event] = [AdapterChanged(info), AliasChanged(alias), AliasDeleted(alias), deleted(1)]
    assert log.latest == 0
    assert [log.append(event) for event in events[:2]] == [1, 2]
    async with aclosing(log.follow(0, None)) as follower:
        assert await take(follower, 2) == [(1, events[0]), (2, events[1])]
        waiting = asyncio.create_task(take(follower, 2))
        await all_wait(log, 1)
        for event in events[2:]:
            log.append(event)
        assert await waiting == [(3, events[2]), (4, events[3])]
    assert log.latest == 4


async def test_a_follower_resumes_after_the_token_of_its_last_message() -> None:
    log = EventLog()
    for version in range(1, 6):
        log.append(deleted(version))
    async with aclosing(log.follow(0, None)) as follower:
        token = log.token_of((await take(follower, 3))[-1][0])
    resumed = log.after(token)
    assert resumed == 3
    async with aclosing(log.follow(resumed, None)) as follower:
        assert await take(follower, 2) == [(4, deleted(4)), (5, deleted(5))]


def test_a_token_is_good_as_long_as_nothing_after_it_is_forgotten() -> None:
    log = EventLog(capacity=3)
    first = log.token_of(0)
    assert log.after(first) == 0
    for version in range(1, 4):
        log.append(deleted(version))
    assert log.after(first) == 0
    log.append(deleted(4))
    assert log.after(first) is None
    assert log.after(log.token_of(1)) == 1
    assert log.after(log.token_of(99)) is None, "it was never given out"
    assert EventLog(capacity=3).after(first) is None, "a restart forgets everything"


@pytest.mark.parametrize(
    "token", ["", "nonsense", "é", "=", "12", base64.urlsafe_b64encode(b"ab:1").decode(), "AAAA" * 100, "\0"]
)
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        EventLog().after(token)
    assert refused.value.field == "resume_token"


async def test_a_follower_that_falls_out_of_the_ring_is_told() -> None:
    log = EventLog(capacity=4)
    async with aclosing(log.follow(0, None)) as follower:
        log.append(deleted(1))
        assert await take(follower, 1) == [(1, deleted(1))]
        for version in range(2, 6):
            log.append(deleted(version))
        assert await take(follower, 1) == [(2, deleted(2))], "the ring holds as many as it says"
        for version in range(6, 8):  # the third event is the first that is overwritten
            log.append(deleted(version))
        with pytest.raises(WatchTooSlow, match=r"more than 4 changes behind; .* last resume_token"):
            await take(follower, 1)


async def test_a_follower_of_a_tenant_sees_that_tenant_alone() -> None:
    log = EventLog()
    for version in range(1, 5):
        log.append(deleted(version, "acme" if version % 2 else "other"))
    async with aclosing(log.follow(0, "acme")) as acme, aclosing(log.follow(0, "other")) as other:
        assert await take(acme, 2) == [(1, deleted(1, "acme")), (3, deleted(3, "acme"))]
        assert await take(other, 2) == [(2, deleted(2, "other")), (4, deleted(4, "other"))]
        waiting = asyncio.create_task(take(acme, 1))
        await all_wait(log, 1)
        log.append(deleted(5, "other"))
        await all_wait(log, 1)
        log.append(deleted(6, "acme"))
        assert await waiting == [(6, deleted(6, "acme"))]


async def test_a_tenants_follower_is_not_slow_for_what_others_do() -> None:
    log = EventLog(capacity=8)
    async with aclosing(log.follow(0, "acme")) as acme:
        waiting = asyncio.create_task(take(acme, 1))
        for version in range(1, 50):
            await all_wait(log, 1)
            log.append(deleted(version, "other"))
        log.append(deleted(50, "acme"))
        assert await waiting == [(50, deleted(50, "acme"))]


async def test_followers_see_what_a_thread_writes_each_once_and_in_order() -> None:
    log = EventLog(capacity=20_000)
    count = 5000

    def write(name: str) -> None:
        for version in range(1, count + 1):
            log.append(AdapterDeleted(AdapterId("default", name, version)))

    async def read() -> list[tuple[int, Event]]:
        async with aclosing(log.follow(0, None)) as follower:
            return await take(follower, 2 * count)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    readers = [asyncio.create_task(read()) for _ in range(8)]
    await all_wait(log, 8)
    for thread in threads:
        thread.start()
    seen = await asyncio.gather(*readers)
    for thread in threads:
        thread.join()
    assert all(events == seen[0] for events in seen)
    assert [sequence for sequence, _ in seen[0]] == list(range(1, 2 * count + 1))
    for name in ("one", "two"):
        versions = [e.id.version for _, e in seen[0] if isinstance(e, AdapterDeleted) and e.id.name == name]
        assert versions == list(range(1, count + 1))


async def test_an_event_that_comes_as_a_follower_begins_to_wait_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog()
    loop = asyncio.get_running_loop()
    create_future = loop.create_future

    def create_late() -> asyncio.Future[None]:
        log.append(deleted(1))
        return create_future()

    async with aclosing(log.follow(0, None)) as follower:
        monkeypatch.setattr(loop, "create_future", create_late)
        assert (await take(follower, 1))[0] == (1, deleted(1))


async def test_followers_of_several_loops_are_woken() -> None:
    log = EventLog()

    async def read() -> list[tuple[int, Event]]:
        async with aclosing(log.follow(0, None)) as follower:
            return await take(follower, 3)

    others = [asyncio.create_task(asyncio.to_thread(asyncio.run, read())) for _ in range(2)]
    readers = [asyncio.create_task(read()), *others]
    await all_wait(log, 3)
    for version in range(1, 4):
        log.append(deleted(version))
    expected = [(version, deleted(version)) for version in range(1, 4)]
    assert await asyncio.gather(*readers) == [expected] * 3


async def test_a_follower_that_goes_away_is_forgotten() -> None:
    log = EventLog()
    followers = [log.follow(0, None) for _ in range(5)]
    tasks = [asyncio.create_task(take(follower, 1)) for follower in followers]
    await all_wait(log, 5)
    for task in tasks[:4]:
        task.cancel()
    await asyncio.wait(tasks[:4])
    assert log.num_waiting == 1
    log.append(deleted(1))
    assert await tasks[4] == [(1, deleted(1))]
    assert log.num_waiting == 0
    for follower in followers:
        await follower.aclose()


async def test_a_follower_that_leaves_as_it_is_woken_harms_nobody() -> None:
    log = EventLog()
    leaver, stayer = log.follow(0, None), log.follow(0, None)
    leaving, staying = asyncio.create_task(take(leaver, 1)), asyncio.create_task(take(stayer, 1))
    await all_wait(log, 2)
    log.append(deleted(1))
    leaving.cancel()  # before the loop runs the wake-up
    assert await staying == [(1, deleted(1))]
    await asyncio.wait([leaving])
    await leaver.aclose()
    await stayer.aclose()


def test_a_closed_loop_does_not_stop_the_writer() -> None:
    log = EventLog()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it would report the task that never ends
    follower = log.follow(0, None)
    waiting = loop.create_task(take(follower, 1))
    loop.run_until_complete(all_wait(log, 1))
    loop.close()
    assert log.append(deleted(1)) == 1
    assert log.append(deleted(2)) == 2
    assert log.num_waiting == 0
    assert not waiting.done()
