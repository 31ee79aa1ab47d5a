"""Deltas cross from the engine's thread to the loop in order, woken once for many, and merged until taken."""

from __future__ import annotations

import asyncio
import threading

from lora_runtime.generation import Delta
from lora_runtime.sampling.tokens import SampledToken
from server.deltas import DeltaHub


class Account:
    def __init__(self) -> None:
        self.seen: list[tuple[Delta, float]] = []

    def add(self, delta: Delta, at_s: float) -> None:
        self.seen.append((delta, at_s))


def delta(text: str, sample: int = 0, token: int = 1) -> Delta:
    return Delta(0, sample, text, (SampledToken(token),))


def in_thread(*work: object) -> None:
    def run() -> None:
        for call in work:
            call()  # type: ignore[operator]

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


async def test_what_was_not_taken_is_one_piece_a_sample() -> None:
    account = Account()
    stream = DeltaHub(clock=lambda: 5.0).open(account, keeps_text=True)
    sent = [delta("a", 1, 1), delta("b", 0, 2), delta("c", 1, 3), delta("", 1, 4)]
    in_thread(*(lambda item=item: stream.post(item) for item in sent))
    pieces = await stream.take()
    assert [(piece.sample, piece.text, [token.token_id for token in piece.tokens]) for piece in pieces] == [
        (1, "ac", [1, 3, 4]),
        (0, "b", [2]),
    ]
    assert account.seen == [(item, 5.0) for item in sent]
    in_thread(lambda: stream.post(delta("d")), stream.post_end)
    assert [piece.text for piece in await stream.take()] == ["d"]
    assert await stream.take() == []
    assert await stream.take() == []


async def test_no_piece_is_too_large_for_a_message() -> None:
    stream = DeltaHub().open(Account(), keeps_text=True)
    in_thread(*(lambda: stream.post(delta("é" * 40)) for _ in range(2500)))
    pieces = await stream.take()
    assert [len(piece.tokens) for piece in pieces] == [1024, 1024, 452]
    assert "".join(piece.text for piece in pieces) == "é" * 100_000


async def test_a_reader_waits_for_what_comes() -> None:
    stream = DeltaHub().open(Account(), keeps_text=True)
    taking = asyncio.ensure_future(stream.take())
    await asyncio.sleep(0.01)
    assert not taking.done()
    in_thread(lambda: stream.post(delta("x")))
    assert [piece.text for piece in await taking] == ["x"]


async def test_the_loop_is_woken_once_for_all_streams() -> None:
    loop = asyncio.get_running_loop()
    hub = DeltaHub()
    streams = [hub.open(Account(), keeps_text=True) for _ in range(10)]
    wakes = 0
    wake = loop.call_soon_threadsafe

    def counted(*args: object) -> object:
        nonlocal wakes
        wakes += 1
        return wake(*args)  # type: ignore[arg-type]

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
    in_thread(*(lambda stream=stream: stream.post(delta("x")) for stream in streams * 100))
    del loop.call_soon_threadsafe
    assert wakes == 1
    for stream in streams:
        assert [piece.text for piece in await stream.take()] == ["x" * 100]


async def test_without_a_reader_deltas_are_only_accounted_for() -> None:
    account = Account()
    stream = DeltaHub().open(account, keeps_text=False)
    in_thread(lambda: stream.post(delta("x")), stream.post_end)
    assert await stream.take() == []
    assert len(account.seen) == 1


async def test_a_closed_stream_takes_and_accounts_for_nothing() -> None:
    account = Account()
    stream = DeltaHub().open(account, keeps_text=True)
    in_thread(lambda: stream.post(delta("x")))
    stream.close()
    await asyncio.sleep(0.01)
    assert account.seen == []


def test_the_engine_does_not_notice_a_loop_that_has_ended() -> None:
    hub = DeltaHub()

    async def opened() -> object:
        return hub.open(Account(), keeps_text=True)

    stream = asyncio.run(opened())
    stream.post(delta("x"))  # type: ignore[attr-defined]
    stream.post(delta("y"))  # type: ignore[attr-defined]
