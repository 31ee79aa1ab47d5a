"""What is read at each scrape: snapshots of the runtime, as samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lora_runtime.types import RunnerStats
from server.metrics.collect import Sample

if TYPE_CHECKING:
    from lora_runtime.decoding import GenerationStats
    from lora_runtime.engine_stats import EngineStats

ENGINE = (
    "multilora_requests_waiting",
    "multilora_requests_running",
    "multilora_queued_sequences",
    "multilora_queued_tokens",
    "multilora_engine_last_turn_timestamp_seconds",
)
KV = (
    "multilora_kv_blocks",
    "multilora_kv_blocks_used",
    "multilora_kv_blocks_cached",
    "multilora_kv_used_ratio",
    "multilora_kv_block_evictions_total",
    "multilora_prompt_tokens_queried_total",
    "multilora_prompt_tokens_cached_total",
    "multilora_generating_sequences",
    "multilora_preemptions_total",
)
RUNNER = (
    "multilora_kernels_compiled_total",
    "multilora_graphs",
    "multilora_graph_bytes",
    "multilora_graph_steps_total",
    "multilora_eager_steps_total",
    "multilora_accelerator_allocated_bytes",
    "multilora_accelerator_reserved_bytes",
    "multilora_accelerator_capacity_bytes",
)
ADMISSION = ("multilora_admitted_sequences", "multilora_admission_limit_sequences")
CERTIFICATE = ("multilora_tls_certificate_expiry_timestamp_seconds",)


def engine_samples(stats: EngineStats | None) -> Iterator[Sample]:
    """None while there is no engine: nothing waits, and no turn is told of."""
    yield "multilora_requests_waiting", (), 0 if stats is None else stats.num_waiting
    yield "multilora_requests_running", (), 0 if stats is None else stats.num_running
    yield "multilora_queued_sequences", (), 0 if stats is None else stats.num_queued_sequences
    yield "multilora_queued_tokens", (), 0 if stats is None else stats.num_queued_tokens
    if stats is not None:
        ago = time.monotonic() - stats.turned_at
        yield "multilora_engine_last_turn_timestamp_seconds", (), time.time() - ago


def kv_samples(stats: GenerationStats | None) -> Iterator[Sample]:
    """All zero where nothing generates."""
    if stats is None:
        yield from ((name, (), 0) for name in KV)
        return
    blocks = stats.blocks
    yield "multilora_kv_blocks", (), blocks.num_total
    yield "multilora_kv_blocks_used", (), blocks.num_used
    yield "multilora_kv_blocks_cached", (), blocks.num_cached
    yield "multilora_kv_used_ratio", (), blocks.num_used / max(blocks.num_total, 1)
    yield "multilora_kv_block_evictions_total", (), blocks.evictions
    yield "multilora_prompt_tokens_queried_total", (), blocks.queried_tokens
    yield "multilora_prompt_tokens_cached_total", (), blocks.hit_tokens
    yield "multilora_generating_sequences", (), stats.num_begun
    yield "multilora_preemptions_total", (), stats.num_preempted


def runner_samples(stats: RunnerStats) -> Iterator[Sample]:
    yield "multilora_kernels_compiled_total", (), stats.num_compiled
    yield "multilora_graph_steps_total", (), stats.replayed_steps
    yield "multilora_graphs", (), stats.num_graphs
    yield "multilora_graph_bytes", (), stats.graph_bytes
    for reason, count in stats.eager_steps.items():
        yield "multilora_eager_steps_total", (reason,), count
    if (memory := stats.device_memory) is not None:
        yield "multilora_accelerator_allocated_bytes", (), memory.allocated
        yield "multilora_accelerator_reserved_bytes", (), memory.reserved
        yield "multilora_accelerator_capacity_bytes", (), memory.capacity


def admission_samples(limit: int, num_sequences: int) -> Iterator[Sample]:
    yield "multilora_admitted_sequences", (), num_sequences
    yield "multilora_admission_limit_sequences", (), limit


def certificate_samples(expires_unix_s: Callable[[], float] | None) -> Iterator[Sample]:
    """None: there is no TLS."""
    if expires_unix_s is not None:
        yield "multilora_tls_certificate_expiry_timestamp_seconds", (), expires_unix_s()
