"""What the engine tells its observers, as metrics."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lora_runtime.errors import MultiloraError
from lora_runtime.observers import EngineObserver
from lora_runtime.types import AdapterId, AdapterInfo, AdapterState, BatchStats, Request, Result
from server.metrics.busiest import BUSIEST, BusiestAdapters
from server.metrics.collect import Sample
from server.metrics.residents import INFO, Residents
from server.metrics.server_metrics import ServerMetrics
from server.tenancy.usage import num_generated_tokens

STATES = ("multilora_adapters",)
MEMORY = (
    "multilora_arena_used_bytes",
    "multilora_arena_capacity_bytes",
    "multilora_host_used_bytes",
    "multilora_host_capacity_bytes",
)
BUSIEST_ADAPTERS = 20

# what a state is the stage of, for as long as it lasts; an adapter with one tier passes HOST in no time
_STAGES = {AdapterState.FETCHING: "fetch", AdapterState.HOST: "room", AdapterState.COPYING: "copy"}
_NEXT = {
    (AdapterState.FETCHING, AdapterState.HOST),
    (AdapterState.HOST, AdapterState.COPYING),
    (AdapterState.COPYING, AdapterState.READY),
}


@dataclass(frozen=True, slots=True)
class _Seen:
    """An adapter as it was told of last."""

    state: AdapterState
    resident_bytes: int
    host_bytes: int
    since: float


@dataclass(frozen=True, slots=True)
class Moving:
    """A load under way, for people."""

    adapter: AdapterId
    state: AdapterState
    seconds: float  # in that state


class EngineMetrics(EngineObserver):
    """Fills the metrics in the engine's thread, and is read from those that scrape."""

    def __init__(
        self,
        metrics: ServerMetrics,
        *,
        arena_bytes: int = 0,
        host_bytes: int | None = None,
        max_busiest: int = BUSIEST_ADAPTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host_bytes` None: the device's memory is the host's, and there is no tier beside it."""
        self._metrics = metrics
        self._clock = clock
        self._arena_bytes = arena_bytes
        self._host_bytes = host_bytes
        self._adapters: dict[AdapterId, _Seen] = {}
        self._states: Tally[AdapterState] = Tally()
        self._resident_bytes = 0
        self._used_host_bytes = 0
        self._busiest = BusiestAdapters(max_busiest, clock)
        self._residents = Residents(arena_bytes)
        metrics.read(STATES, self._state_samples)
        metrics.read(MEMORY, self._memory_samples)
        metrics.read(BUSIEST, self._busiest.samples)
        metrics.read((INFO,), self._residents.samples)

    def on_batch(self, stats: BatchStats) -> None:
        self._metrics.observe_batch(stats)

    def on_result(self, request: Request, result: Result | MultiloraError) -> None:
        is_known = request.adapter.is_base or request.adapter in self._adapters
        adapter = request.adapter if is_known else None
        if not isinstance(result, Result):
            self._busiest.count(adapter, ok=False)
            return
        num_tokens = sum(sequence.num_tokens for sequence in request.sequences)
        num_generated = 0 if request.generation is None else num_generated_tokens(result)
        self._busiest.count(adapter, ok=True, input_tokens=num_tokens, generated_tokens=num_generated)
        self._metrics.count_input(num_tokens)
        self._metrics.observe_stage("queue", result.timings.queue_s)
        self._metrics.observe_stage("load_wait", result.timings.load_wait_s)
        self._metrics.observe_stage("forward", result.timings.forward_s)

    def on_adapter(self, info: AdapterInfo) -> None:
        before, now = self._adapters.get(info.id), self._clock()
        is_moved = before is None or before.state is not info.state
        since = now if before is None or is_moved else before.since
        self._put(info.id, _Seen(info.state, info.resident_bytes, info.host_bytes, since))
        if before is not None and (before.state, info.state) in _NEXT:
            self._metrics.observe_load_stage(_STAGES[before.state], now - before.since)
        if not is_moved:
            return
        if info.state is AdapterState.READY and info.load_seconds is not None:
            self._metrics.observe_load(info.load_seconds)
        if info.state is AdapterState.FAILED and info.failure is not None:
            self._metrics.count_load_failure(info.failure.metadata.get("code", info.failure.reason))

    def on_deleted(self, adapter: AdapterId) -> None:
        self._put(adapter, None)
        self._busiest.forget(adapter)

    def on_evicted(self, adapter: AdapterId, tier: str) -> None:  # noqa: ARG002 - the protocol's
        self._metrics.count_eviction(tier)

    def loads(self) -> list[Moving]:
        """Adapters on their way to the device, the one that is longest in its state first; from any thread."""
        now, adapters = self._clock(), self._adapters.copy()
        moving = [
            Moving(adapter, seen.state, now - seen.since) for adapter, seen in adapters.items() if seen.state in _STAGES
        ]
        return sorted(moving, key=lambda one: -one.seconds)

    def _put(self, adapter: AdapterId, seen: _Seen | None) -> None:
        before = self._adapters.pop(adapter, None)
        if before is not None:
            self._states[before.state] -= 1
            self._resident_bytes -= before.resident_bytes
            self._used_host_bytes -= before.host_bytes
        if seen is not None:
            self._adapters[adapter] = seen
            self._states[seen.state] += 1
            self._resident_bytes += seen.resident_bytes
            self._used_host_bytes += seen.host_bytes
        self._residents.put(adapter, None if seen is None else seen.state, 0 if seen is None else seen.resident_bytes)

    def _state_samples(self) -> Iterator[Sample]:
        return (("multilora_adapters", (state.value,), self._states[state]) for state in AdapterState)

    def _memory_samples(self) -> Iterator[Sample]:
        yield "multilora_arena_used_bytes", (), self._resident_bytes
        yield "multilora_arena_capacity_bytes", (), self._arena_bytes
        if self._host_bytes is not None:
            yield "multilora_host_used_bytes", (), self._used_host_bytes
            yield "multilora_host_capacity_bytes", (), self._host_bytes
