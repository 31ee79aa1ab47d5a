"""Which adapters are on the device and which are on their way, as routers read it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from lora_runtime.types import AdapterId, AdapterState
from server.metrics.collect import Sample

INFO = "multilora_lora_requests_info"
_LOADING = (AdapterState.FETCHING, AdapterState.HOST, AdapterState.COPYING)
_MAX_LISTED = 500  # names in one label; the last to come
_USUAL_BYTES = 1 << 20  # of an adapter, until one is there to measure by


class Residents:
    """Versions of one adapter are one name, `TENANT/NAME`. Told in the engine's thread, read from others."""

    def __init__(self, capacity_bytes: int, wall_clock: Callable[[], float] = time.time) -> None:
        self._capacity_bytes = capacity_bytes
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._ready: dict[AdapterId, int] = {}  # bytes on the device, in the order they came
        self._loading: dict[AdapterId, None] = {}
        self._used_bytes = 0
        self._changed_at = wall_clock()
        self._sample: Sample | None = None  # until something changes

    def put(self, adapter: AdapterId, state: AdapterState | None, num_bytes: int = 0) -> None:
        """It is in a state now; None: it is gone."""
        with self._lock:
            was = adapter in self._ready, adapter in self._loading
            now = state is AdapterState.READY, state in _LOADING
            if was == now and not any(now):
                return
            self._used_bytes += (num_bytes if now[0] else 0) - self._ready.pop(adapter, 0)
            self._loading.pop(adapter, None)
            if now[0]:
                self._ready[adapter] = num_bytes
            if now[1]:
                self._loading[adapter] = None
            if was != now:
                self._changed_at, self._sample = self._wall_clock(), None

    def samples(self) -> Iterator[Sample]:
        """Exactly one."""
        with self._lock:
            if self._sample is None:
                labels = (str(self._room()), _names(self._ready), _names(self._loading))
                self._sample = INFO, labels, self._changed_at
            yield self._sample

    def _room(self) -> int:
        """How many would fit of the size of those that are there: the room is one of bytes, not of a number."""
        mean = self._used_bytes / len(self._ready) if self._used_bytes else _USUAL_BYTES
        return max(len(self._ready), int(self._capacity_bytes / mean), 1)


def _names(adapters: dict[AdapterId, int] | dict[AdapterId, None]) -> str:
    names = dict.fromkeys(f"{adapter.tenant}/{adapter.name}" for adapter in adapters)
    return ",".join([*names][-_MAX_LISTED:])
