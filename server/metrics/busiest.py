"""Counters by adapter with a bound on their number: the busiest have series of their own, all others are `other`.

Each request is counted exactly once: for its adapter where that is shown at the time, else under `other`. So no counter
ever goes down, and the sum over all of them is exact as long as no adapter is deleted. An adapter that becomes busy
lacks what was counted as `other` before; one that is no longer among the busiest keeps its count, and goes on from it
when it is shown again.

The busiest are those with the most requests, each of which counts half as much after ten minutes. They are chosen anew
at a scrape, every ten seconds at most; one that is shown goes only for one that is half as busy again, so that two
alike do not take turns.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_runtime.types import AdapterId
from server.metrics.collect import Sample

REQUESTS = "multilora_adapter_requests_total"
INPUT_TOKENS = "multilora_adapter_input_tokens_total"
GENERATED_TOKENS = "multilora_adapter_generated_tokens_total"
BUSIEST = (REQUESTS, INPUT_TOKENS, GENERATED_TOKENS)

_OTHER = ("", "other", "")  # tenant, adapter, version: an adapter's tenant is never empty
_HALF_LIFE_S = 600.0
_MAX_DOUBLINGS = 500.0  # of a request's weight, before all are scaled back: a float ends at 2^1023
_CHOOSE_EVERY_S = 10.0
_STAYS = 1.5  # how much busier another must be than one that is shown


@dataclass(slots=True)
class _Counts:
    num_ok: int = 0
    num_failed: int = 0
    input_tokens: int = 0
    generated_tokens: int = 0

    def add(self, ok: bool, input_tokens: int, generated_tokens: int) -> None:
        self.num_ok += ok
        self.num_failed += not ok
        self.input_tokens += input_tokens
        self.generated_tokens += generated_tokens

    def samples(self, labels: tuple[str, str, str]) -> Iterator[Sample]:
        yield REQUESTS, (*labels, "ok"), self.num_ok
        yield REQUESTS, (*labels, "error"), self.num_failed
        yield INPUT_TOKENS, labels, self.input_tokens
        yield GENERATED_TOKENS, labels, self.generated_tokens


class BusiestAdapters:
    """Counted in the engine's thread, read from those that scrape."""

    def __init__(self, max_shown: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_shown = max_shown
        self._clock = clock
        self._lock = threading.Lock()  # of everything below
        self._counts: dict[AdapterId, _Counts] = {}  # of those that are or were shown
        self._activity: dict[AdapterId, float] = {}
        self._shown: set[AdapterId] = set()
        self._other = _Counts()
        self._began_at = self._chosen_at = clock()  # `_began_at`: when a request weighed 1

    def count(self, adapter: AdapterId | None, *, ok: bool, input_tokens: int = 0, generated_tokens: int = 0) -> None:
        """A request was finished; `adapter` None for one that is deleted."""
        with self._lock:
            counts = self._other if adapter is None else self._counts_of(adapter)
            counts.add(ok, input_tokens, generated_tokens)

    def forget(self, adapter: AdapterId) -> None:
        """It is deleted, and its series go with it."""
        with self._lock:
            self._counts.pop(adapter, None)
            self._activity.pop(adapter, None)
            self._shown.discard(adapter)

    def samples(self) -> list[Sample]:
        """At most four for each adapter that is shown, and four of `other`."""
        with self._lock:
            if self._clock() - self._chosen_at >= _CHOOSE_EVERY_S:
                self._choose()
            samples = [*self._other.samples(_OTHER)]
            for adapter in sorted(self._shown):
                labels = (adapter.tenant, adapter.name, str(adapter.version))
                samples += self._counts[adapter].samples(labels)
            return samples

    def _counts_of(self, adapter: AdapterId) -> _Counts:
        doublings = (self._clock() - self._began_at) / _HALF_LIFE_S
        if doublings > _MAX_DOUBLINGS:
            self._activity = {known: score * 2.0**-doublings for known, score in self._activity.items()}
            self._began_at, doublings = self._clock(), 0.0
        self._activity[adapter] = self._activity.get(adapter, 0.0) + 2.0**doublings
        if adapter not in self._shown and len(self._shown) < self._max_shown:
            self._show(adapter)
        return self._counts[adapter] if adapter in self._shown else self._other

    def _choose(self) -> None:
        self._chosen_at = self._clock()
        if len(self._activity) <= self._max_shown:
            return

        def rank(adapter: AdapterId) -> float:
            return self._activity[adapter] * (_STAYS if adapter in self._shown else 1.0)

        chosen = heapq.nlargest(self._max_shown, self._activity, key=rank)
        self._shown.clear()
        for adapter in chosen:
            self._show(adapter)

    def _show(self, adapter: AdapterId) -> None:
        self._shown.add(adapter)
        self._counts.setdefault(adapter, _Counts())
