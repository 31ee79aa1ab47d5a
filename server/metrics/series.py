"""Every series, declared once: the collectors and the README's table are made from `SERIES`.

No histogram has a label per adapter or tenant: a thousand adapters with thirteen buckets each make a scrape slow. What
is counted by adapter or tenant has a bound on its samples (`busiest.py`, `tenancy/usage_metrics.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PREFIX = "multilora_"

# An encoder answers within a millisecond: the usual buckets, which begin at 5 ms, would show nothing.
_LATENCY_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LOAD_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_COUNT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Page(StrEnum):
    """Where a series is served."""

    METRICS = "/metrics"
    ROUTER = "/metrics/router"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Series:
    """One declared series. `unit` is what one of it counts; `buckets` are of histograms alone."""

    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    page: Page = Page.METRICS


def _counter(unit: str, text: str, *labels: str) -> Series:
    return Series(Kind.COUNTER, unit, text, labels)


def _gauge(unit: str, text: str, *labels: str, page: Page = Page.METRICS) -> Series:
    return Series(Kind.GAUGE, unit, text, labels, page=page)


def _histogram(unit: str, buckets: tuple[float, ...], text: str, *labels: str) -> Series:
    return Series(Kind.HISTOGRAM, unit, text, labels, buckets)


_RPCS = {
    "multilora_requests_total": _counter(
        "requests", "RPCs answered, by method and gRPC status code.", "method", "code"
    ),
    "multilora_request_seconds": _histogram(
        "seconds", _LATENCY_S, "Seconds from an RPC's arrival to its reply, errors included.", "method"
    ),
    "multilora_stage_seconds": _histogram(
        "seconds",
        _LATENCY_S,
        "Seconds an answered request spent in each stage: tokenize, queue, load_wait, forward, interpret, and total.",
        "stage",
    ),
    "multilora_rejections_total": _counter(
        "requests", "RPCs that ended with an error of ours, by the reason in its ErrorInfo.", "reason"
    ),
    "multilora_admitted_sequences": _gauge(
        "sequences", "Permits in use: sequences that are admitted and not yet answered.", page=Page.BOTH
    ),
    "multilora_admission_limit_sequences": _gauge(
        "sequences", "Permits: sequences the server admits at most.", page=Page.BOTH
    ),
}

_ENGINE = {
    "multilora_requests_waiting": _gauge("requests", "Requests that no batch has carried yet.", page=Page.BOTH),
    "multilora_requests_running": _gauge("requests", "Requests that have begun and have no reply.", page=Page.BOTH),
    "multilora_queued_sequences": _gauge("sequences", "Sequences that wait for a batch."),
    "multilora_queued_tokens": _gauge("tokens", "Tokens of the sequences that wait for a batch.", page=Page.BOTH),
    "multilora_engine_last_turn_timestamp_seconds": _gauge(
        "seconds", "Unix time at which the engine's loop last began a turn; a stalled engine's stands still."
    ),
    "multilora_batch_sequences": _histogram("sequences", _COUNT, "Sequences in one batch."),
    "multilora_batch_tokens": _histogram("tokens", _TOKENS, "Tokens in one batch."),
    "multilora_batch_adapters": _histogram(
        "adapters", (0, *_COUNT), "Distinct adapters in one batch, the base not counted."
    ),
    "multilora_batch_forward_seconds": _histogram("seconds", _LATENCY_S, "Seconds of one batch's forward pass."),
}

_TOKENS_OF_TEXTS = {
    "multilora_input_tokens_total": _counter("tokens", "Tokens of the texts and prompts of answered requests."),
    "multilora_generated_tokens_total": _counter(
        "tokens", "Tokens that were generated, those of failed requests included."
    ),
    "multilora_time_to_first_token_seconds": _histogram(
        "seconds", _FIRST_TOKEN_S, "Seconds from a generating request's arrival to its first token."
    ),
    "multilora_inter_token_seconds": _histogram(
        "seconds", _TOKEN_S, "Seconds between two tokens of one sample, one observation a token."
    ),
    "multilora_finished_samples_total": _counter(
        "samples",
        "Samples whose generation ended, by reason (eos, stop_token, stop_string, length, cancelled, deadline, error); "
        "of failed requests too.",
        "finish_reason",
    ),
    "multilora_open_streams": _gauge("streams", "Streams of generated text that are open."),
    "multilora_generating_sequences": _gauge("sequences", "Texts under way, those that wait for room to go on too."),
    "multilora_preemptions_total": _counter(
        "sequences", "Texts under way that gave their blocks to others and were computed again."
    ),
}

_KV = {
    "multilora_kv_blocks": _gauge("blocks", "Blocks of the KV cache."),
    "multilora_kv_blocks_used": _gauge("blocks", "Blocks that hold keys and values of texts under way."),
    "multilora_kv_blocks_cached": _gauge("blocks", "Blocks of nobody, kept for prompts that begin as those did."),
    "multilora_kv_used_ratio": _gauge(
        "ratio", "Share of the KV cache's blocks that texts under way hold, 0 to 1.", page=Page.BOTH
    ),
    "multilora_kv_block_evictions_total": _counter("blocks", "Blocks kept for later prompts that made room."),
    "multilora_prompt_tokens_queried_total": _counter(
        "tokens", "Tokens of prompts that the prefix cache was asked for."
    ),
    "multilora_prompt_tokens_cached_total": _counter("tokens", "Tokens of prompts that the prefix cache had."),
}

_ADAPTERS = {
    "multilora_adapters": _gauge("adapters", "Adapter versions in each state.", "state"),
    "multilora_adapter_load_seconds": _histogram(
        "seconds", _LOAD_S, "Seconds from an adapter's load being asked for to its being resident."
    ),
    "multilora_adapter_load_stage_seconds": _histogram(
        "seconds",
        _LOAD_S,
        "Seconds of each stage of a load: fetch (download, read, validate), room (waits for memory), copy.",
        "stage",
    ),
    "multilora_adapter_load_failures_total": _counter("loads", "Times an adapter was refused, by reason.", "reason"),
    "multilora_adapter_evictions_total": _counter(
        "adapters", "Adapters that made room for others, by tier: device, host.", "tier"
    ),
    "multilora_adapter_requests_total": _counter(
        "requests",
        "Requests that the engine finished, by adapter and outcome (ok, error): the busiest adapters; `other` for the "
        "rest.",
        "tenant",
        "adapter",
        "version",
        "outcome",
    ),
    "multilora_adapter_input_tokens_total": _counter(
        "tokens",
        "Tokens of the texts and prompts of answered requests, as above.",
        "tenant",
        "adapter",
        "version",
    ),
    "multilora_adapter_generated_tokens_total": _counter(
        "tokens", "Tokens that answered requests generated, as above.", "tenant", "adapter", "version"
    ),
    "multilora_lora_requests_info": _gauge(
        "seconds",
        "Unix time of the last change of its labels: most adapters that `max_lora` says, those on the device and those "
        "that load, as TENANT/NAME.",
        "max_lora",
        "running_lora_adapters",
        "waiting_lora_adapters",
        page=Page.ROUTER,
    ),
}

_MEMORY = {
    "multilora_arena_used_bytes": _gauge("bytes", "Bytes of device memory that adapters hold.", page=Page.BOTH),
    "multilora_arena_capacity_bytes": _gauge("bytes", "Bytes of device memory set aside for adapters.", page=Page.BOTH),
    "multilora_host_used_bytes": _gauge(
        "bytes", "Bytes of host memory that adapters hold beside the device's; absent on a CPU."
    ),
    "multilora_host_capacity_bytes": _gauge(
        "bytes", "Bytes of host memory set aside for adapters beside the device's; absent on a CPU."
    ),
    "multilora_accelerator_allocated_bytes": _gauge(
        "bytes", "Bytes of the accelerator that tensors hold; absent on a CPU."
    ),
    "multilora_accelerator_reserved_bytes": _gauge(
        "bytes", "Bytes of the accelerator that this process has taken; absent on a CPU."
    ),
    "multilora_accelerator_capacity_bytes": _gauge("bytes", "Bytes of the accelerator; absent on a CPU."),
}

_RUNNER = {
    "multilora_kernels_compiled_total": _counter(
        "kernels", "Kernels compiled since the start; grows after it only if a shape was missed."
    ),
    "multilora_graphs": _gauge("graphs", "CUDA graphs captured."),
    "multilora_graph_bytes": _gauge("bytes", "Bytes of device memory that CUDA graphs take."),
    "multilora_graph_steps_total": _counter("batches", "Batches that a captured CUDA graph ran."),
    "multilora_eager_steps_total": _counter(
        "batches",
        "Batches that no CUDA graph fitted, where there are graphs, by reason: extras, size, cached, variant.",
        "reason",
    ),
}

_TENANTS = {
    "multilora_tenant_requests_total": _counter(
        "requests", "Requests that the engine finished, by tenant and outcome: ok or error.", "tenant", "outcome"
    ),
    "multilora_tenant_tokens_total": _counter("tokens", "Input tokens of answered requests, by tenant.", "tenant"),
    "multilora_tenant_rejections_total": _counter(
        "requests", "Requests refused by a limit of their tenant, by tenant and limit.", "tenant", "quota"
    ),
}

_SERVER = {
    "multilora_build_info": _gauge("info", "1, with the versions that run.", "version", "python", "torch"),
    "multilora_tls_certificate_expiry_timestamp_seconds": _gauge(
        "seconds", "Unix time at which the server's certificate expires; absent without TLS."
    ),
}

GROUPS: dict[str, dict[str, Series]] = {
    "RPCs": _RPCS,
    "Engine": _ENGINE,
    "Texts": _TOKENS_OF_TEXTS,
    "KV and prefix cache": _KV,
    "Adapters": _ADAPTERS,
    "Memory": _MEMORY,
    "Kernels and graphs": _RUNNER,
    "Tenants": _TENANTS,
    "Server": _SERVER,
}
SERIES: dict[str, Series] = {name: series for group in GROUPS.values() for name, series in group.items()}
