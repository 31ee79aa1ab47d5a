"""`/debug/state`: what an operator wants to see of a server that behaves oddly. No text of a request, and no key."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from typing import Any

from lora_runtime.types import AdapterInfo, AdapterState
from server.admission import Admission
from server.backend import Backend
from server.metrics.engine_metrics import EngineMetrics
from server.operations.probes import Probes
from server.settings import MIB, ServeSettings

_PACKAGES = ("multilora", "torch", "transformers", "grpcio", "protobuf")
_MAX_LISTED = 100  # adapters of one kind


class DebugState:
    """Reads what each part knows by itself, so it answers for an engine that is stuck."""

    def __init__(
        self,
        settings: ServeSettings,
        probes: Probes,
        admission: Admission,
        engine_metrics: EngineMetrics,
        backend: Callable[[], Backend | None],
    ) -> None:
        self._settings = settings
        self._probes = probes
        self._admission = admission
        self._engine_metrics = engine_metrics
        self._backend = backend
        self._started = time.monotonic()
        self._versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}

    def read(self) -> dict[str, Any]:
        """As JSON has it."""
        backend = self._backend()
        return {
            "versions": self._versions,
            "phase": str(self._probes.phase),
            "live": self._probes.why_not_live() or True,
            "ready": self._probes.why_not_ready() or True,
            "uptime_seconds": round(time.monotonic() - self._started, 3),
            "device": self._settings.device,
            "dtype": self._settings.dtype,
            "admission": {"sequences": self._admission.num_sequences, "limit": self._admission.max_sequences},
            "loads": self._loads(),
            **({} if backend is None else _of_backend(backend, self._settings.arena_mib * MIB)),
        }

    def _loads(self) -> list[dict[str, Any]]:
        """Those that are longest in their state first."""
        return [
            {"adapter": str(load.adapter), "state": load.state, "seconds": round(load.seconds, 3)}
            for load in self._engine_metrics.loads()[:_MAX_LISTED]
        ]


def _of_backend(backend: Backend, arena_bytes: int) -> dict[str, Any]:
    stats, generation = backend.engine.stats(), backend.engine.generation_stats()
    adapters = backend.engine.catalogue.all()
    return {
        "base": backend.base_name,
        "engine": {
            "seconds_since_turn": round(time.monotonic() - stats.turned_at, 3),
            "requests_waiting": stats.num_waiting,
            "requests_running": stats.num_running,
            "queued_sequences": stats.num_queued_sequences,
            "queued_tokens": stats.num_queued_tokens,
        },
        "adapters": _adapters(adapters),
        "arena": {"used_bytes": sum(info.resident_bytes for info in adapters), "capacity_bytes": arena_bytes},
        "host_used_bytes": sum(info.host_bytes for info in adapters),
        "kv": None if generation is None else asdict(generation),
        "runner": asdict(backend.stats()),
    }


def _adapters(adapters: list[AdapterInfo]) -> dict[str, Any]:
    states = Counter(info.state for info in adapters)
    failed = [info for info in adapters if info.failure is not None]
    resident = sorted((info for info in adapters if info.resident_bytes), key=lambda info: -info.resident_bytes)
    return {
        "by_state": {state.value: states[state] for state in AdapterState},
        "failed": [
            {"adapter": str(info.id), "reason": info.failure.reason, "message": info.failure.message}
            for info in failed[:_MAX_LISTED]
            if info.failure is not None
        ],
        "largest_resident": [
            {"adapter": str(info.id), "bytes": info.resident_bytes, "pinned": info.pinned, "ranks": info.ranks}
            for info in resident[:_MAX_LISTED]
        ],
    }
