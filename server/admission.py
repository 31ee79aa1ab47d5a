"""Admission: a bound on the sequences inside the server, enforced before any CPU is spent on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from lora_runtime.errors import CapacityExceeded
from server.early_refusal import EarlyRefusal
from server.retry import retry_after_s

_SMOOTHING = 0.1  # weight of the newest hold time in the moving average


@dataclass(slots=True)
class MeanHold:
    """A moving average of the seconds that something is held."""

    seconds: float = 0.0

    def add(self, held_s: float) -> None:
        self.seconds += _SMOOTHING * (held_s - self.seconds)


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
    memory, and the caller can retry at another replica. With `early`, so is one whose deadline will pass before its
    tenant's turn comes.
    """

    def __init__(
        self, max_sequences: int, *, early: EarlyRefusal | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_sequences = max_sequences
        self.num_sequences = 0  # permits that are out
        self._clock = clock
        self._mean_hold = MeanHold()
        self._early = early

    @contextmanager
    def permits(self, num_sequences: int, remaining_s: float | None = None, tenant: str = "") -> Generator[Permits]:
        """Hold `num_sequences` permits for the block.

        `remaining_s`: until the caller's deadline, None without one. Raises CapacityExceeded when the permits are not
        free, DeadlineUnreachable when they would come too late; then nothing is held.
        """
        if self._early is not None and remaining_s is not None:
            self._early.check(tenant, num_sequences, remaining_s)
        permits = Permits(lambda num_more: self._take(tenant, num_more), num_sequences)
        started = self._clock()
        answered = False
        try:
            yield permits
            answered = True
        finally:
            self.num_sequences -= permits.num_sequences
            self._mean_hold.add(self._clock() - started)
            if self._early is not None:
                self._early.left(tenant, permits.num_sequences, answered=answered)

    def _take(self, tenant: str, num_sequences: int) -> None:
        if self.num_sequences + num_sequences > self.max_sequences:
            raise self._refusal(num_sequences)
        self.num_sequences += num_sequences
        if self._early is not None:
            self._early.entered(tenant, num_sequences)

    def _refusal(self, num_sequences: int) -> CapacityExceeded:
        missing = self.num_sequences + num_sequences - self.max_sequences
        return CapacityExceeded(
            f"the server is full: it holds {self.num_sequences} of at most {self.max_sequences} sequences and "
            f"{num_sequences} more do not fit; try again later or ask another replica",
            retry_after_s=retry_after_s(missing, self.num_sequences, self._mean_hold.seconds),
            limit=self.max_sequences,
        )
