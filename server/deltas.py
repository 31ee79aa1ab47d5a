"""Generated text on its way from the engine's thread to the requests that wait for it in the loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lora_runtime.generation import Delta
from lora_runtime.sampling.tokens import SampledToken

_MAX_PIECE_CHARS, _MAX_PIECE_TOKENS = 1 << 16, 1024  # a message that has one stays far below the 4 MiB clients take


class DeltaAccount(Protocol):
    """Who wants to know of each delta, when it is seen in the loop; `at_s` is `time.monotonic()` of its making."""

    def add(self, delta: Delta, at_s: float) -> None: ...


@dataclass(slots=True)
class Piece:
    """What one sample got since its reader looked last, or a part of it."""

    sample: int
    _texts: list[str] = field(default_factory=list[str])
    tokens: list[SampledToken] = field(default_factory=list[SampledToken])
    _num_chars: int = 0

    def append(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._num_chars += len(delta.text)
        self.tokens.extend(delta.tokens)

    @property
    def is_full(self) -> bool:
        return self._num_chars >= _MAX_PIECE_CHARS or len(self.tokens) >= _MAX_PIECE_TOKENS

    @property
    def text(self) -> str:
        return "".join(self._texts)


class DeltaStream:
    """What one request generates. `post` and `post_end` are the engine's thread's; all else belongs to the loop.

    With `keeps_text`, which is for a request of one sequence, a reader takes pieces; else deltas are only accounted
    for. What is kept is bounded by what the request may generate.
    """

    def __init__(self, hub: DeltaHub, account: DeltaAccount, *, keeps_text: bool) -> None:
        self._hub = hub
        self._account = account
        self._keeps_text = keeps_text
        self._pieces: list[Piece] = []  # the one that has waited longest first
        self._growing: dict[int, Piece] = {}  # those of them that take more, by sample
        self._changed = asyncio.Event()
        self._ended = False
        self._closed = False

    def post(self, delta: Delta) -> None:
        """For `Generation.on_delta`: neither blocks nor raises."""
        self._hub.post(self, delta)

    def post_end(self) -> None:
        """There are no more deltas."""
        self._hub.post(self, None)

    async def take(self) -> list[Piece]:
        """What has come and was not taken, once there is some; nothing after the last.

        A sample has one piece, however many deltas it got, and more only where that would be a large one.
        """
        while not self._pieces and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        pieces, self._pieces, self._growing = self._pieces, [], {}
        return pieces

    def close(self) -> None:
        """Nobody reads any more, and nothing is accounted for any more."""
        self._closed = True
        self._pieces, self._growing = [], {}

    def put(self, delta: Delta | None, at_s: float) -> None:
        """The hub's: one delta, None after the last."""
        if self._closed:
            return
        if delta is None:
            self._ended = True
        else:
            self._account.add(delta, at_s)
            if not self._keeps_text:
                return
            self._keep(delta)
        self._changed.set()

    def _keep(self, delta: Delta) -> None:
        piece = self._growing.get(delta.sample)
        if piece is None or piece.is_full:
            piece = self._growing[delta.sample] = Piece(delta.sample)
            self._pieces.append(piece)
        piece.append(delta)


class DeltaHub:
    """Takes the deltas of all streams over to the loop, which is woken once for all that come before it looks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: deque[tuple[DeltaStream, Delta | None, float]] = deque()
        self._is_woken = False

    def open(self, account: DeltaAccount, *, keeps_text: bool) -> DeltaStream:
        """A stream for the loop that runs now, the same for all."""
        self._loop = asyncio.get_running_loop()
        return DeltaStream(self, account, keeps_text=keeps_text)

    def post(self, stream: DeltaStream, delta: Delta | None) -> None:
        """From any thread."""
        self._posted.append((stream, delta, self._clock()))
        if self._is_woken:  # the loop lowers it before it looks, so it will see what was appended before this line
            return
        self._is_woken = True
        assert self._loop is not None, "a stream was opened in a loop"
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop has ended, and with it whoever would read
            self._posted.clear()
            self._is_woken = False

    def _deliver(self) -> None:
        self._is_woken = False
        while self._posted:
            stream, delta, at_s = self._posted.popleft()
            stream.put(delta, at_s)
