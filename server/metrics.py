"""Prometheus metrics. Every series is declared in `SERIES`; nothing carries a label per adapter.

A histogram per adapter would make scrapes slow at a thousand adapters, so distributions are over all adapters
together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import TypeAlias
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from lora_runtime.errors import MultiloraError
from lora_runtime.observers import EngineObserver
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.types import AdapterId, AdapterInfo, AdapterState, BatchStats, Request, Result

Metric: TypeAlias = Counter | Gauge | Histogram

# An encoder answers within a millisecond: the usual buckets, which begin at 5 ms, would show nothing.
_LATENCY_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LOAD_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_COUNT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Series:
    """One declared metric; `buckets` only for histograms."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SERIES: dict[str, Series] = {
    "multilora_requests_total": Series(Counter, "RPCs answered, by method and gRPC status code.", ("method", "code")),
    "multilora_request_seconds": Series(
        Histogram, "Seconds from an RPC's arrival to its reply, errors included.", ("method",), _LATENCY_S
    ),
    "multilora_stage_seconds": Series(
        Histogram,
        "Seconds an answered request spent in each stage: tokenize, queue, load_wait, forward, interpret.",
        ("stage",),
        _LATENCY_S,
    ),
    "multilora_admitted_sequences": Series(Gauge, "Sequences inside the server: admitted and not yet answered."),
    "multilora_admission_limit_sequences": Series(Gauge, "Sequences the server admits at most."),
    "multilora_batch_sequences": Series(Histogram, "Sequences in one batch.", (), _COUNT),
    "multilora_batch_tokens": Series(Histogram, "Tokens in one batch.", (), _TOKENS),
    "multilora_batch_adapters": Series(
        Histogram, "Distinct adapters in one batch, the base not counted.", (), (0, *_COUNT)
    ),
    "multilora_batch_forward_seconds": Series(Histogram, "Seconds of one batch's forward pass.", (), _LATENCY_S),
    "multilora_generated_tokens_total": Series(
        Counter, "Tokens that were generated, those of failed requests included."
    ),
    "multilora_time_to_first_token_seconds": Series(
        Histogram, "Seconds from a generating request's arrival to its first token.", (), _FIRST_TOKEN_S
    ),
    "multilora_inter_token_seconds": Series(
        Histogram, "Seconds between two tokens of one sample, one observation a token.", (), _TOKEN_S
    ),
    "multilora_finished_samples_total": Series(
        Counter, "Samples whose generation ended, by reason; of failed requests too.", ("finish_reason",)
    ),
    "multilora_open_streams": Series(Gauge, "Streams of generated text that are open."),
    "multilora_adapters": Series(Gauge, "Adapter versions in each state.", ("state",)),
    "multilora_adapter_load_seconds": Series(
        Histogram, "Seconds from the first read of an adapter's files to being resident.", (), _LOAD_S
    ),
    "multilora_adapter_load_failures_total": Series(Counter, "Times an adapter was refused, by reason.", ("reason",)),
    "multilora_arena_used_bytes": Series(Gauge, "Bytes of device memory that adapters hold."),
    "multilora_arena_capacity_bytes": Series(Gauge, "Bytes of device memory set aside for adapters."),
}
STAGES = ("tokenize", "queue", "load_wait", "forward", "interpret")


class ServerMetrics:
    """The series on a registry of their own, and the calls that fill them; safe from any thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series per counter that nothing reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._metrics = {name: _create(name, series, self.registry) for name, series in SERIES.items()}
        # labels() costs more than observe(): children with a known label set are looked up once
        self._stages = {stage: self._histogram("multilora_stage_seconds").labels(stage) for stage in STAGES}
        self._states = {state: self._gauge("multilora_adapters").labels(state.value) for state in AdapterState}
        self._finished = {
            reason: self._counter("multilora_finished_samples_total").labels(reason.value) for reason in FinishReason
        }
        self._durations: dict[str, Histogram] = {}
        self._answers: dict[tuple[str, str], Counter] = {}

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """Count one RPC; `method` is `package.Service/Method`."""
        if (method, code) not in self._answers:
            self._answers[method, code] = self._counter("multilora_requests_total").labels(method, code)
        if method not in self._durations:
            self._durations[method] = self._histogram("multilora_request_seconds").labels(method)
        self._answers[method, code].inc()
        self._durations[method].observe(seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        self._stages[stage].observe(seconds)

    def count_generated(self, num_tokens: int) -> None:
        self._counter("multilora_generated_tokens_total").inc(num_tokens)

    def observe_first_token(self, seconds: float) -> None:
        self._histogram("multilora_time_to_first_token_seconds").observe(seconds)

    def observe_token(self, seconds: float) -> None:
        """The time since the sample's token before."""
        self._histogram("multilora_inter_token_seconds").observe(seconds)

    def count_finished(self, reason: FinishReason, num_samples: int = 1) -> None:
        self._finished[reason].inc(num_samples)

    @contextmanager
    def open_stream(self) -> Generator[None]:
        """Count a stream as open for the block."""
        gauge = self._gauge("multilora_open_streams")
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def watch_admission(self, limit: int, num_sequences: Callable[[], float]) -> None:
        """Read the admitted sequences at each scrape instead of at each request."""
        self._gauge("multilora_admission_limit_sequences").set(limit)
        self._gauge("multilora_admitted_sequences").set_function(num_sequences)

    def set_arena_capacity(self, num_bytes: int) -> None:
        self._gauge("multilora_arena_capacity_bytes").set(num_bytes)

    def observe_batch(self, stats: BatchStats) -> None:
        self._histogram("multilora_batch_sequences").observe(stats.num_sequences)
        self._histogram("multilora_batch_tokens").observe(stats.num_tokens)
        self._histogram("multilora_batch_adapters").observe(stats.num_adapters)
        self._histogram("multilora_batch_forward_seconds").observe(stats.forward_s)

    def observe_load(self, seconds: float) -> None:
        self._histogram("multilora_adapter_load_seconds").observe(seconds)

    def count_load_failure(self, reason: str) -> None:
        self._counter("multilora_adapter_load_failures_total").labels(reason).inc()

    def move_adapter(self, before: AdapterState | None, after: AdapterState, resident_bytes_change: int) -> None:
        if before is not None:
            self._states[before].dec()
        self._states[after].inc()
        self._gauge("multilora_arena_used_bytes").inc(resident_bytes_change)

    def forget_adapter(self, state: AdapterState, resident_bytes: int) -> None:
        self._states[state].dec()
        self._gauge("multilora_arena_used_bytes").dec(resident_bytes)

    def _counter(self, name: str) -> Counter:
        metric = self._metrics[name]
        assert isinstance(metric, Counter), name
        return metric

    def _gauge(self, name: str) -> Gauge:
        metric = self._metrics[name]
        assert isinstance(metric, Gauge), name
        return metric

    def _histogram(self, name: str) -> Histogram:
        metric = self._metrics[name]
        assert isinstance(metric, Histogram), name
        return metric


class EngineMetrics(EngineObserver):
    """An engine observer that fills the metrics. Called in the engine's thread alone."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._adapters: dict[AdapterId, tuple[AdapterState, int]] = {}

    def on_batch(self, stats: BatchStats) -> None:
        self._metrics.observe_batch(stats)

    def on_result(self, request: Request, result: Result | MultiloraError) -> None:  # noqa: ARG002 - the protocol's
        if isinstance(result, Result):
            self._metrics.observe_stage("queue", result.timings.queue_s)
            self._metrics.observe_stage("load_wait", result.timings.load_wait_s)
            self._metrics.observe_stage("forward", result.timings.forward_s)

    def on_adapter(self, info: AdapterInfo) -> None:
        before, bytes_before = self._adapters.get(info.id, (None, 0))
        self._adapters[info.id] = (info.state, info.resident_bytes)
        self._metrics.move_adapter(before, info.state, info.resident_bytes - bytes_before)
        if info.state is before:
            return
        if info.state is AdapterState.READY and info.load_seconds is not None:
            self._metrics.observe_load(info.load_seconds)
        if info.state is AdapterState.FAILED and info.failure is not None:
            self._metrics.count_load_failure(info.failure.metadata.get("code", info.failure.reason))

    def on_deleted(self, adapter: AdapterId) -> None:
        state, num_bytes = self._adapters.pop(adapter)
        self._metrics.forget_adapter(state, num_bytes)


class MetricsEndpoint:
    """`/metrics` over HTTP in a thread of its own; raises OSError when the address is taken."""

    def __init__(self, metrics: ServerMetrics, host: str, port: int) -> None:
        self._server: WSGIServer
        self._thread: Thread
        self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _create(name: str, series: Series, registry: CollectorRegistry) -> Metric:
    if series.kind is Histogram:
        return Histogram(name, series.help, series.labels, buckets=series.buckets, registry=registry)
    return series.kind(name, series.help, series.labels, registry=registry)
