"""Admission: a bound on the sequences inside the server, enforced before any CPU is spent on them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from lora_runtime.errors import CapacityExceeded, MultiloraError

_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 5.0
_SMOOTHING = 0.1  # weight of the newest hold time in the moving average

_MIN_COMPLETIONS = 20  # that an estimate of the waiting time rests on
_SLICE_S = 0.05  # a batch answers many requests at once: single gaps say nothing
_MAX_SLICES = 64
_RECENT_S = 60.0  # the adapters asked may be others by then
_MAX_GAP_S = 1.0  # a longer silence is a cold adapter that loads, not the pace of the engine


class DeadlineUnreachable(MultiloraError):
    """The deadline lies before the time at which the request would be answered; refused before any work on it."""

    reason = "DEADLINE_UNREACHABLE"

    def __init__(self, wait_s: float, remaining_s: float) -> None:
        super().__init__(
            f"the wait is about {wait_s:.3g} s and the deadline is in {remaining_s:.3g} s; allow more time, try again "
            "later or ask another replica",
            wait_s=f"{wait_s:.3g}",
            remaining_s=f"{remaining_s:.3g}",
        )
        self.retry_after_s = clamp_retry_s(wait_s - remaining_s)


def clamp_retry_s(seconds: float) -> float:
    """A hint that neither invites a storm nor sends the caller away for long."""
    return min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)


def retry_after_s(num_missing: int, num_held: int, mean_hold_s: float) -> float:
    """When `num_missing` of `num_held` will be free. Little's law: num_held / mean_hold_s come back per second."""
    return clamp_retry_s(num_missing * mean_hold_s / max(num_held, 1))


@dataclass(slots=True)
class MeanHold:
    """A moving average of the seconds that something is held."""

    seconds: float = 0.0

    def add(self, held_s: float) -> None:
        self.seconds += _SMOOTHING * (held_s - self.seconds)


@dataclass(slots=True)
class _Slice:
    """Busy time, and what was answered in it."""

    max_inside: int
    seconds: float = 0.0
    num_sequences: int = 0
    num_completions: int = 0
    ended_at: float = 0.0


class EarlyRefusal:
    """A moving estimate of the waiting time: sequences inside / sequences answered per second of busy time.

    A server with little to do answers little, which says nothing of what it could do. So the pace for n sequences
    inside is taken only from times with at least n / 2 of them inside; without 20 completions there, no estimate.
    Requests that failed do not count as answered: expired ones would make an overloaded server look fast.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counted_until = clock()
        self._slice = _Slice(0)
        self._recent: deque[_Slice] = deque(maxlen=_MAX_SLICES)

    def entered(self, num_before: int, num_inside: int) -> None:
        """`num_before` sequences inside have become `num_inside`."""
        if num_before == 0:
            self._counted_until = self._clock()  # idle until now
        self._slice.max_inside = max(self._slice.max_inside, num_inside)

    def completed(self, num_sequences: int, num_inside: int) -> None:
        """A request of `num_sequences` was answered; `num_inside` are left."""
        now = self._clock()
        current = self._slice
        current.seconds += min(now - self._counted_until, _MAX_GAP_S)
        current.num_sequences += num_sequences
        current.num_completions += 1
        current.ended_at = self._counted_until = now
        if current.seconds >= _SLICE_S:
            self._recent.append(current)
            self._slice = _Slice(num_inside)

    def wait_s(self, num_inside: int) -> float | None:
        """Seconds until those inside are answered; None: too little is known."""
        if num_inside == 0:
            return 0.0
        since = self._clock() - _RECENT_S
        slices = [s for s in self._recent if s.ended_at >= since and 2 * s.max_inside >= num_inside]
        if sum(s.num_completions for s in slices) < _MIN_COMPLETIONS:
            return None
        return num_inside * sum(s.seconds for s in slices) / sum(s.num_sequences for s in slices)

    def check(self, num_inside: int, remaining_s: float) -> None:
        """Raise DeadlineUnreachable when the wait is longer than `remaining_s`."""
        wait_s = self.wait_s(num_inside)
        if wait_s is not None and wait_s > max(remaining_s, 0.0):
            raise DeadlineUnreachable(wait_s, remaining_s)


class Permits:
    """What one request holds. `grow_to` may take more; whoever made them gives all of them back, once."""

    def __init__(self, take: Callable[[int], None], num_sequences: int) -> None:
        self._take = take
        take(num_sequences)
        self.num_sequences = num_sequences

    def grow_to(self, num_sequences: int) -> None:
        """Hold `num_sequences` in all; raises CapacityExceeded, holding what it held, when they are not free.

        A long text turns out to be several sequences only once it is tokenised. Never shrinks.
        """
        if num_sequences > self.num_sequences:
            self._take(num_sequences - self.num_sequences)
            self.num_sequences = num_sequences


class Admission:
    """Permits counted in sequences. Belongs to the asyncio loop: not thread-safe, and nothing waits.

    A request that does not fit is refused at once: a queue of refused work would only move the overload into
    memory, and the caller can retry at another replica. With `refuse_early`, so is one whose deadline will pass
    before those inside are answered.
    """

    def __init__(
        self, max_sequences: int, *, refuse_early: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_sequences = max_sequences
        self.num_sequences = 0  # permits that are out
        self._clock = clock
        self._mean_hold = MeanHold()
        self._early = EarlyRefusal(clock) if refuse_early else None

    @contextmanager
    def permits(self, num_sequences: int, remaining_s: float | None = None) -> Generator[Permits]:
        """Hold `num_sequences` permits for the block.

        `remaining_s`: until the caller's deadline, None without one. Raises CapacityExceeded when the permits are not
        free, DeadlineUnreachable when they would come too late; then nothing is held.
        """
        if self._early is not None and remaining_s is not None:
            self._early.check(self.num_sequences, remaining_s)
        permits = Permits(self._take, num_sequences)
        started = self._clock()
        answered = False
        try:
            yield permits
            answered = True
        finally:
            self.num_sequences -= permits.num_sequences
            self._mean_hold.add(self._clock() - started)
            if answered and self._early is not None:
                self._early.completed(permits.num_sequences, self.num_sequences)

    def _take(self, num_sequences: int) -> None:
        if self.num_sequences + num_sequences > self.max_sequences:
            raise self._refusal(num_sequences)
        self.num_sequences += num_sequences
        if self._early is not None:
            self._early.entered(self.num_sequences - num_sequences, self.num_sequences)

    def _refusal(self, num_sequences: int) -> CapacityExceeded:
        missing = self.num_sequences + num_sequences - self.max_sequences
        return CapacityExceeded(
            f"the server is full: it holds {self.num_sequences} of at most {self.max_sequences} sequences and "
            f"{num_sequences} more do not fit; try again later or ask another replica",
            retry_after_s=retry_after_s(missing, self.num_sequences, self._mean_hold.seconds),
            limit=self.max_sequences,
        )
