"""The registry of one server, and the calls that fill it as things happen."""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from lora_runtime.sampling.finish import FinishReason
from lora_runtime.types import BatchStats
from server.metrics.collect import Sample, Scraped, counter, gauge, histogram
from server.metrics.router import router_page
from server.metrics.series import SERIES, Page

STAGES = ("tokenize", "queue", "load_wait", "forward", "interpret", "total")
LOAD_STAGES = ("fetch", "room", "copy")
TIERS = ("device", "host")


class ServerMetrics:
    """The series on a registry of their own, and the calls that fill them; safe from any thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series per counter that nothing reads
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = counter("multilora_requests_total", registry)
        self._request_seconds = histogram("multilora_request_seconds", registry)
        self._rejections = counter("multilora_rejections_total", registry)
        self._batch = [
            histogram(f"multilora_batch_{what}", registry)
            for what in ("sequences", "tokens", "adapters", "forward_seconds")
        ]
        self._input_tokens = counter("multilora_input_tokens_total", registry)
        self._generated_tokens = counter("multilora_generated_tokens_total", registry)
        self._first_token = histogram("multilora_time_to_first_token_seconds", registry)
        self._inter_token = histogram("multilora_inter_token_seconds", registry)
        self._open_streams = gauge("multilora_open_streams", registry)
        self._loads = histogram("multilora_adapter_load_seconds", registry)
        self._load_failures = counter("multilora_adapter_load_failures_total", registry)
        # labels() costs more than observe(): children with a known label set are looked up once
        stages = histogram("multilora_stage_seconds", registry)
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        load_stages = histogram("multilora_adapter_load_stage_seconds", registry)
        self._load_stages = {stage: load_stages.labels(stage) for stage in LOAD_STAGES}
        evictions = counter("multilora_adapter_evictions_total", registry)
        self._evictions = {tier: evictions.labels(tier) for tier in TIERS}
        finished = counter("multilora_finished_samples_total", registry)
        self._finished = {reason: finished.labels(reason.value) for reason in FinishReason}
        self._durations: dict[str, Histogram] = {}
        self._answers: dict[tuple[str, str], Counter] = {}
        self._router_sources: list[Callable[[], Iterable[Sample]]] = []
        versions = (metadata.version("multilora"), platform.python_version(), metadata.version("torch"))
        gauge("multilora_build_info", registry).labels(*versions).set(1)

    def read(self, names: Sequence[str], source: Callable[[], Iterable[Sample]]) -> None:
        """Have `source` give the samples of these series at each scrape, on the pages that they are of.

        It runs in the thread that scrapes; a series that it gives no sample of is absent.
        """
        scraped = [name for name in names if SERIES[name].page is not Page.ROUTER]
        if scraped:
            self.registry.register(Scraped(scraped, lambda: [sample for sample in source() if sample[0] in scraped]))
        if any(SERIES[name].page is not Page.METRICS for name in names):
            self._router_sources.append(source)

    def router_page(self) -> str:
        """The few gauges that routers ask for many times a second."""
        return router_page(sample for source in self._router_sources for sample in source())

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """Count one RPC; `method` is `package.Service/Method`."""
        if (method, code) not in self._answers:
            self._answers[method, code] = self._requests.labels(method, code)
        if method not in self._durations:
            self._durations[method] = self._request_seconds.labels(method)
        self._answers[method, code].inc()
        self._durations[method].observe(seconds)

    def count_rejection(self, reason: str) -> None:
        """An RPC ends with an error; `reason` is one of those of the error tree, so they are few."""
        self._rejections.labels(reason).inc()

    def observe_stage(self, stage: str, seconds: float) -> None:
        self._stages[stage].observe(seconds)

    def count_input(self, num_tokens: int) -> None:
        self._input_tokens.inc(num_tokens)

    def count_generated(self, num_tokens: int) -> None:
        self._generated_tokens.inc(num_tokens)

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def observe_token(self, seconds: float) -> None:
        """The time since the sample's token before."""
        self._inter_token.observe(seconds)

    def count_finished(self, reason: FinishReason, num_samples: int = 1) -> None:
        self._finished[reason].inc(num_samples)

    @contextmanager
    def open_stream(self) -> Generator[None]:
        """Count a stream as open for the block."""
        self._open_streams.inc()
        try:
            yield
        finally:
            self._open_streams.dec()

    def observe_batch(self, stats: BatchStats) -> None:
        values = (stats.num_sequences, stats.num_tokens, stats.num_adapters, stats.forward_s)
        for series, value in zip(self._batch, values, strict=True):
            series.observe(value)

    def observe_load(self, seconds: float) -> None:
        self._loads.observe(seconds)

    def observe_load_stage(self, stage: str, seconds: float) -> None:
        self._load_stages[stage].observe(seconds)

    def count_load_failure(self, reason: str) -> None:
        self._load_failures.labels(reason).inc()

    def count_eviction(self, tier: str) -> None:
        self._evictions[tier].inc()
