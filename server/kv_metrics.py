"""Metrics of the KV cache and of what generates, read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from lora_runtime.decoding import GenerationStats

GAUGES = {
    "multilora_kv_blocks": "Blocks of the KV cache.",
    "multilora_kv_blocks_used": "Blocks that hold keys and values of texts under way.",
    "multilora_kv_blocks_cached": "Blocks of nobody, kept for prompts that begin as those did.",
    "multilora_generating_sequences": "Texts under way, those that wait for room to go on too.",
}
COUNTERS = {
    "multilora_prompt_tokens_queried_total": "Tokens of prompts that the prefix cache was asked for.",
    "multilora_prompt_tokens_cached_total": "Tokens of prompts that the prefix cache had.",
    "multilora_preemptions_total": "Texts under way that gave their blocks to others and were computed again.",
}
HELP = {**GAUGES, **COUNTERS}


class KvMetrics(Collector):
    """Asks `stats` at every scrape; all zero where nothing generates."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], GenerationStats | None]) -> None:
        self._stats = stats
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        values = dict.fromkeys(HELP, 0)
        if (stats := self._stats()) is not None:
            blocks = stats.blocks
            values = {
                "multilora_kv_blocks": blocks.num_total,
                "multilora_kv_blocks_used": blocks.num_used,
                "multilora_kv_blocks_cached": blocks.num_cached,
                "multilora_generating_sequences": stats.num_begun,
                "multilora_prompt_tokens_queried_total": blocks.queried_tokens,
                "multilora_prompt_tokens_cached_total": blocks.hit_tokens,
                "multilora_preemptions_total": stats.num_preempted,
            }
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=values[name])
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=values[name])
