"""Requests that would be answered after their deadline are refused before anything is spent on them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lora_runtime.errors import MultiloraError
from server.retry import clamp_retry_s

_MIN_COMPLETIONS = 20  # that an estimate of the waiting time rests on
_SLICE_S = 0.05  # a batch answers many requests at once: single gaps say nothing
_MAX_SLICES = 64
_RECENT_S = 60.0  # the adapters asked may be others by then
_MAX_GAP_S = 1.0  # a longer silence is a cold adapter that loads, not the pace of the engine
_CAUTION = 1.25  # an answer that comes a little after its deadline has cost as much as one in time


class DeadlineUnreachable(MultiloraError):
    """The deadline lies before the time at which the request would be answered; refused before any work on it."""

    reason = "DEADLINE_UNREACHABLE"

    def __init__(self, wait_s: float, remaining_s: float) -> None:
        super().__init__(
            f"an answer may take {wait_s:.3g} s and the deadline is in {remaining_s:.3g} s; allow more time, try again "
            "later or ask another replica",
            wait_s=f"{wait_s:.3g}",
            remaining_s=f"{remaining_s:.3g}",
        )
        self.retry_after_s = clamp_retry_s(wait_s - remaining_s)


@dataclass(slots=True)
class _Slice:
    """Busy time, and what was answered in it."""

    max_inside: int
    seconds: float = 0.0
    num_sequences: int = 0
    num_completions: int = 0
    ended_at: float = 0.0


class _Pace:
    """Seconds of busy time per sequence answered.

    A server with little to do answers little, which says nothing of what it could do. So the pace for n sequences
    inside is taken only from times with at least n / 2 of them inside; without 20 completions there, no estimate.
    Requests that failed do not count as answered: expired ones would make an overloaded server look fast.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
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

    def seconds_each(self, num_inside: int) -> float | None:
        """Per sequence, with `num_inside` of them; None: too little is known."""
        since = self._clock() - _RECENT_S
        slices = [s for s in self._recent if s.ended_at >= since and 2 * s.max_inside >= num_inside]
        if sum(s.num_completions for s in slices) < _MIN_COMPLETIONS:
            return None
        return sum(s.seconds for s in slices) / sum(s.num_sequences for s in slices)


class EarlyRefusal:
    """Estimates when a tenant's next request would be answered, from the pace of the last minute.

    Sooner than all that is inside when the tenant has had less than its share: the scheduler then serves it by weight,
    so of what is inside counts its own, times the weights of all that wait over its own weight. Priorities are not
    looked at. Belongs to the asyncio loop.
    """

    def __init__(
        self, weight_of: Callable[[str], float] = lambda _tenant: 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._weight_of = weight_of
        self._pace = _Pace(clock)
        self._num_inside = 0
        self._inside: dict[str, int] = {}  # sequences by tenant, of those that have any

    def entered(self, tenant: str, num_sequences: int) -> None:
        """`num_sequences` more of a tenant are inside."""
        self._inside[tenant] = self._inside.get(tenant, 0) + num_sequences
        self._num_inside += num_sequences
        self._pace.entered(self._num_inside - num_sequences, self._num_inside)

    def left(self, tenant: str, num_sequences: int, *, answered: bool) -> None:
        """A request of `num_sequences` is inside no more."""
        self._num_inside -= num_sequences
        self._inside[tenant] -= num_sequences
        if not self._inside[tenant]:
            del self._inside[tenant]
        if answered:
            self._pace.completed(num_sequences, self._num_inside)

    def check(self, tenant: str, num_sequences: int, remaining_s: float) -> None:
        """Raise DeadlineUnreachable when an answer would probably come after `remaining_s`.

        Nobody is refused while nobody is inside, or while too little is known.
        """
        if not self._num_inside or (each_s := self._pace.seconds_each(self._num_inside)) is None:
            return
        each_s *= _CAUTION
        wait_s = (self._num_inside + num_sequences) * each_s
        if wait_s > max(remaining_s, 0.0):  # only then are the tenants looked at, who may be many
            wait_s = min(wait_s, self._share_ahead(tenant, num_sequences) * each_s)
        if wait_s > max(remaining_s, 0.0):
            raise DeadlineUnreachable(wait_s, remaining_s)

    def _share_ahead(self, tenant: str, num_sequences: int) -> float:
        """Sequences of all that are served until a request of `tenant` is, by weight."""
        weight = self._weight_of(tenant)
        weights = weight + sum(self._weight_of(other) for other in self._inside if other != tenant)
        return (self._inside.get(tenant, 0) + num_sequences) * weights / weight
