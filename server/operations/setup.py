"""The metrics port of one server, and everything that is read at a scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lora_runtime.decoding import GenerationStats
from lora_runtime.engine_stats import EngineStats
from lora_runtime.types import RunnerStats
from server.admission import Admission
from server.backend import Backend
from server.metrics import ServerMetrics
from server.metrics.engine_metrics import EngineMetrics
from server.metrics.readings import (
    ADMISSION,
    CERTIFICATE,
    ENGINE,
    KV,
    RUNNER,
    admission_samples,
    certificate_samples,
    engine_samples,
    kv_samples,
    runner_samples,
)
from server.operations.debug_state import DebugState
from server.operations.endpoints import Endpoints
from server.operations.http import HttpServer
from server.operations.probes import Probes
from server.rpc.health import Health
from server.settings import MIB, ServeSettings
from server.tenancy.setup import Tenancy


class Operations:
    """`backend` gives what is served with, None while it loads."""

    def __init__(
        self,
        settings: ServeSettings,
        metrics: ServerMetrics,
        tenancy: Tenancy,
        admission: Admission,
        health: Health,
        backend: Callable[[], Backend | None],
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._tenancy = tenancy
        self._backend = backend
        self._probes = Probes(health, backend, settings.stall_seconds)
        self.engine_metrics = EngineMetrics(
            metrics,
            arena_bytes=settings.arena_mib * MIB,
            host_bytes=None if settings.device == "cpu" else settings.host_mib * MIB,
            max_busiest=settings.busiest_adapters,
        )
        self._state = DebugState(settings, self._probes, admission, self.engine_metrics, backend)
        self._http: HttpServer | None = None
        metrics.read(ADMISSION, lambda: admission_samples(admission.max_sequences, admission.num_sequences))
        metrics.read(ENGINE, lambda: engine_samples(self._engine_stats()))
        metrics.read(KV, lambda: kv_samples(self._generation_stats()))
        metrics.read(RUNNER, lambda: runner_samples(self._runner_stats()))
        metrics.read(CERTIFICATE, lambda: certificate_samples(tenancy.certificate_expires_unix_s))

    @property
    def port(self) -> int:
        return self._settings.metrics_port if self._http is None else self._http.port

    def listen(self) -> None:
        """Answer from now on; in the loop of the RPCs. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        endpoints = Endpoints(
            self._metrics, self._probes, self._tenancy.gate, self._tenancy.audit, self._state.read, loop
        )
        self._http = HttpServer(self._settings.metrics_host, self._settings.metrics_port, endpoints.routes)

    def close(self) -> None:
        """Blocks for the answer that is being made."""
        if self._http is not None:
            self._http.close()

    def _engine_stats(self) -> EngineStats | None:
        backend = self._backend()
        return None if backend is None else backend.engine.stats()

    def _generation_stats(self) -> GenerationStats | None:
        backend = self._backend()
        return None if backend is None else backend.engine.generation_stats()

    def _runner_stats(self) -> RunnerStats:
        backend = self._backend()
        return RunnerStats() if backend is None else backend.stats()
