"""Metrics of the model's runner, read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lora_runtime.types import RunnerStats

COUNTERS = {
    "multilora_kernels_compiled_total": "Kernels compiled since the start; grows after it only if a shape was missed.",
    "multilora_graph_steps_total": "Batches that a captured CUDA graph ran.",
}
GAUGES = {
    "multilora_graphs": "CUDA graphs captured.",
    "multilora_graph_bytes": "Bytes of device memory that CUDA graphs take.",
}
EAGER_STEPS = "multilora_eager_steps_total"
EAGER_HELP = "Batches that no CUDA graph fitted, where there are graphs, by reason: extras, size, cached, variant."
HELP = {**COUNTERS, **GAUGES, EAGER_STEPS: EAGER_HELP}


class RunnerMetrics(Collector):
    """Asks `stats` at every scrape."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], RunnerStats]) -> None:
        self._stats = stats
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        values = {
            "multilora_kernels_compiled_total": stats.num_compiled,
            "multilora_graph_steps_total": stats.replayed_steps,
            "multilora_graphs": stats.num_graphs,
            "multilora_graph_bytes": stats.graph_bytes,
        }
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=values[name])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=values[name])
        eager = CounterMetricFamily(EAGER_STEPS, EAGER_HELP, labels=("reason",))
        for reason, count in stats.eager_steps.items():
            eager.add_metric((reason,), count)
        yield eager
