"""Admission: a bound on the sequences inside the server, enforced before any CPU is spent on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from lora_runtime.errors import CapacityExceeded

_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 5.0
_SMOOTHING = 0.1  # weight of the newest hold time in the moving average


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
    memory, and the caller can retry at another replica.
    """

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.num_sequences = 0  # permits that are out
        self._mean_hold_s = 0.0

    @contextmanager
    def permits(self, num_sequences: int) -> Generator[Permits]:
        """Hold `num_sequences` permits for the block; raises CapacityExceeded when they are not free."""
        permits = Permits(self._take, num_sequences)
        started = time.monotonic()
        try:
            yield permits
        finally:
            self.num_sequences -= permits.num_sequences
            held_s = time.monotonic() - started
            self._mean_hold_s += _SMOOTHING * (held_s - self._mean_hold_s)

    def _take(self, num_sequences: int) -> None:
        if self.num_sequences + num_sequences > self.max_sequences:
            raise self._refusal(num_sequences)
        self.num_sequences += num_sequences

    def _refusal(self, num_sequences: int) -> CapacityExceeded:
        return CapacityExceeded(
            f"the server is full: it holds {self.num_sequences} of at most {self.max_sequences} sequences and "
            f"{num_sequences} more do not fit; try again later or ask another replica",
            retry_after_s=self._retry_after_s(num_sequences),
            limit=self.max_sequences,
        )

    def _retry_after_s(self, num_sequences: int) -> float:
        # Little's law: permits come back at num_sequences / mean hold time per second.
        missing = self.num_sequences + num_sequences - self.max_sequences
        wait_s = missing * self._mean_hold_s / max(self.num_sequences, 1)
        return min(max(wait_s, _MIN_RETRY_S), _MAX_RETRY_S)
