"""What the dashboards show. After a change: `python -m deploy.grafana.generate`."""

from __future__ import annotations

from deploy.grafana.panels import Dashboard, Limit, Panel, Row, Variable, heatmap, lines, stat, table

_JOB = Variable("job", "multilora_build_info")
_INSTANCE = Variable("instance", "multilora_build_info")
_SERVERS = 'job=~"$job", instance=~"$instance"'
_MAX_ROWS = 20


def _of(series: str, *matchers: str) -> str:
    return f"{series}{{{', '.join((_SERVERS, *matchers))}}}"


def _sum(series: str, by: str = "", *matchers: str) -> str:
    return f"sum{f' by ({by})' if by else ''} ({_of(series, *matchers)})"


def _rate(series: str, by: str = "", *matchers: str) -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({_of(series, *matchers)}[$__rate_interval]))"


def _per(numerator: str, denominator: str) -> str:
    return f"{numerator} / {denominator}"


def _mean(histogram: str) -> str:
    return _per(_rate(f"{histogram}_sum"), _rate(f"{histogram}_count"))


def _quantile(share: float, histogram: str, by: str = "", *matchers: str) -> str:
    buckets = _rate(f"{histogram}_bucket", f"le, {by}" if by else "le", *matchers)
    return f"histogram_quantile({share}, {buckets})"


def _quantiles(histogram: str, *matchers: str) -> tuple[tuple[str, str], ...]:
    return tuple((_quantile(share, histogram, "", *matchers), f"p{share * 100:g}") for share in (0.5, 0.9, 0.99))


def _recorded(rule: str, legend: str) -> tuple[str, str]:
    return f'{rule}{{job=~"$job"}}', legend


_BURN_FAST = Limit(14.4 * 0.001, "MultiloraErrorBudgetBurnsFast")
_STALLED = Limit(30, "MultiloraEngineStalled")
_THRASH = Limit(0.1, "MultiloraAdaptersThrash")
_QUEUE = Limit(0.5, "MultiloraQueueGrows")
_REJECTS = Limit(0.01, "MultiloraRejects")
_TENANT_LIMITED = Limit(0.1, "MultiloraTenantLimited")
_CERTIFICATE = Limit(14 * 86400, "MultiloraCertificateExpires", below=True)
_LOADS_FAIL = Limit(0, "MultiloraAdapterLoadsFail")

_FAULTS = 'code=~"INTERNAL|UNKNOWN|UNAVAILABLE|DATA_LOSS"'
_FULL = 'reason=~"CAPACITY_EXCEEDED|DEADLINE_UNREACHABLE"'
_REJECTED = _per(_rate("multilora_rejections_total", "instance", _FULL), _rate("multilora_requests_total", "instance"))
_PERMITS = _per(_of("multilora_admitted_sequences"), _of("multilora_admission_limit_sequences"))
_TURN_AGE = f"time() - {_of('multilora_engine_last_turn_timestamp_seconds')}"
_CERTIFICATE_LEFT = f"{_of('multilora_tls_certificate_expiry_timestamp_seconds')} - time()"
_ALERTS = Panel("Alerts", "short", (), "alertlist", width=24, height=6, text="Alerts of deploy/prometheus.")

OVERVIEW = Dashboard(
    "overview",
    "Overview",
    "Whether callers are served, how fast, and what stands in their way.",
    (
        stat("Servers", "short", f"count({_of('multilora_build_info')})", text="Servers that Prometheus reads."),
        stat("Requests", "reqps", _rate("multilora_requests_total")),
        stat(
            "Errors of ours",
            "percentunit",
            _per(f"({_rate('multilora_requests_total', '', _FAULTS)} or vector(0))", _rate("multilora_requests_total")),
            _BURN_FAST,
        ),
        stat("p99 of answers", "s", _quantile(0.99, "multilora_request_seconds")),
        stat("Permits in use", "percentunit", f"max({_PERMITS})", _QUEUE),
        stat("Refused: full", "percentunit", f"max({_REJECTED})", _REJECTS),
        stat("Longest engine turn", "s", f"max({_TURN_AGE})", _STALLED),
        stat("Certificate left", "s", f"min({_CERTIFICATE_LEFT})", _CERTIFICATE),
        Row("Traffic"),
        lines("Requests by method", "reqps", (_rate("multilora_requests_total", "method"), "{{method}}"), stack=True),
        lines("Requests by status", "reqps", (_rate("multilora_requests_total", "code"), "{{code}}"), stack=True),
        lines(
            "Tokens",
            "suffix: tokens/s",
            (_rate("multilora_input_tokens_total"), "input"),
            (_rate("multilora_generated_tokens_total"), "generated"),
        ),
        Row("Latency"),
        lines("Latency", "s", *_quantiles("multilora_request_seconds")),
        lines("p99 by method", "s", (_quantile(0.99, "multilora_request_seconds", "method"), "{{method}}")),
        lines("p99 by stage", "s", (_quantile(0.99, "multilora_stage_seconds", "stage"), "{{stage}}")),
        lines("Time to first token", "s", *_quantiles("multilora_time_to_first_token_seconds")),
        lines("Between tokens", "s", *_quantiles("multilora_inter_token_seconds")),
        heatmap("Latency of requests", "s", _rate("multilora_request_seconds_bucket", "le")),
        Row("What is refused, and the error budget"),
        lines(
            "Error budget: share of failed requests",
            "percentunit",
            *(
                _recorded(f"multilora:request_errors:ratio_rate{window}", f"{{{{job}}}} {window}")
                for window in ("5m", "30m", "1h", "6h")
            ),
            limit=_BURN_FAST,
            text="99.9 % of the requests in 30 days may not fail by a fault of ours; at the line, an hour spends a "
            "fiftieth of what may.",
        ),
        lines(
            "Rejections by reason", "reqps", (_rate("multilora_rejections_total", "reason"), "{{reason}}"), stack=True
        ),
        lines("Share refused for want of room", "percentunit", (_REJECTED, "{{instance}}"), limit=_REJECTS),
        lines(
            "Permits",
            "short",
            (_of("multilora_admitted_sequences"), "{{instance}} in use"),
            (_of("multilora_admission_limit_sequences"), "{{instance}} limit"),
        ),
        lines("Permits in use", "percentunit", (_PERMITS, "{{instance}}"), limit=_QUEUE),
        table("Versions", "short", (_sum("multilora_build_info", "instance, version, python, torch"), "servers")),
        _ALERTS,
    ),
    (_JOB, _INSTANCE),
)

_TENANT = 'tenant=~"$tenant"'
_BY_ADAPTER = "tenant, adapter, version"
_ADAPTER = "{{tenant}}/{{adapter}}@{{version}}"


def _top(expression: str) -> str:
    return f"topk({_MAX_ROWS}, {expression})"


# as the alert counts them: a reason's first failure makes its series, which begins at 1
_FAILURES = _of("multilora_adapter_load_failures_total")
_FAILED_LOADS = f"increase({_FAILURES}[15m]) > 0 or ({_FAILURES} unless {_FAILURES} offset 15m)"

ADAPTERS = Dashboard(
    "adapters",
    "Adapters",
    "Which adapters are asked, which are in memory, and how they come and go.",
    (
        Row("Who is asked"),
        lines("Requests", "reqps", (_top(_rate("multilora_adapter_requests_total", _BY_ADAPTER, _TENANT)), _ADAPTER)),
        lines(
            "Errors",
            "reqps",
            (_top(_rate("multilora_adapter_requests_total", _BY_ADAPTER, _TENANT, 'outcome="error"')), _ADAPTER),
        ),
        lines(
            "Input tokens",
            "suffix: tokens/s",
            (_top(_rate("multilora_adapter_input_tokens_total", _BY_ADAPTER, _TENANT)), _ADAPTER),
        ),
        lines(
            "Generated tokens",
            "suffix: tokens/s",
            (_top(_rate("multilora_adapter_generated_tokens_total", _BY_ADAPTER, _TENANT)), _ADAPTER),
        ),
        lines("Distinct adapters in a batch", "short", (_mean("multilora_batch_adapters"), "mean")),
        lines("Waited for a load", "s", *_quantiles("multilora_stage_seconds", 'stage="load_wait"')),
        Row("Loads and evictions"),
        lines("Adapters by state", "short", (_sum("multilora_adapters", "state"), "{{state}}"), stack=True),
        lines("Load", "s", *_quantiles("multilora_adapter_load_seconds")),
        lines(
            "p99 of a load by stage",
            "s",
            (_quantile(0.99, "multilora_adapter_load_stage_seconds", "stage"), "{{stage}}"),
        ),
        lines(
            "Failed loads in 15 minutes",
            "short",
            (
                f"sum by (job, instance, reason) ({_FAILED_LOADS})",
                "{{instance}} {{reason}}",
            ),
            limit=_LOADS_FAIL,
        ),
        lines(
            "Evictions", "ops", (_rate("multilora_adapter_evictions_total", "instance, tier"), "{{instance}} {{tier}}")
        ),
        lines(
            "Evictions per request",
            "percentunit",
            (f"{_of('multilora:adapter_evictions_per_request:rate10m')}", "{{instance}}"),
            limit=_THRASH,
            text="Adapters that left the device for each request, over ten minutes.",
        ),
        Row("Memory of adapters"),
        lines(
            "On the device",
            "bytes",
            (_of("multilora_arena_used_bytes"), "{{instance}} used"),
            (_of("multilora_arena_capacity_bytes"), "{{instance}} capacity"),
        ),
        lines(
            "On the host, beside the device",
            "bytes",
            (_of("multilora_host_used_bytes"), "{{instance}} used"),
            (_of("multilora_host_capacity_bytes"), "{{instance}} capacity"),
        ),
    ),
    (_JOB, _INSTANCE, Variable("tenant", "multilora_adapter_requests_total")),
)

_TENANTS_REQUESTS = _rate("multilora_tenant_requests_total", "tenant", _TENANT)


def _in_range(series: str, by: str) -> str:
    return f"sum by ({by}) (increase({_of(series, _TENANT)}[$__range]))"


TENANTS = Dashboard(
    "tenants",
    "Tenants",
    "Who uses the server, how much, and who meets a limit.",
    (
        lines("Requests", "reqps", (_TENANTS_REQUESTS, "{{tenant}}"), stack=True),
        lines(
            "Tokens",
            "suffix: tokens/s",
            (_rate("multilora_tenant_tokens_total", "tenant", _TENANT), "{{tenant}}"),
            stack=True,
        ),
        lines(
            "Share of requests that fail",
            "percentunit",
            (
                _per(_rate("multilora_tenant_requests_total", "tenant", _TENANT, 'outcome="error"'), _TENANTS_REQUESTS),
                "{{tenant}}",
            ),
        ),
        lines(
            "Refused by a limit",
            "reqps",
            (_rate("multilora_tenant_rejections_total", "tenant, quota", _TENANT), "{{tenant}} {{quota}}"),
            limit=_TENANT_LIMITED,
        ),
        Panel(
            "Share of the tokens",
            "percentunit",
            (
                (
                    _per(
                        _rate("multilora_tenant_tokens_total", "tenant", _TENANT),
                        f"on () group_left () {_rate('multilora_tenant_tokens_total')}",
                    ),
                    "{{tenant}}",
                ),
            ),
            "bargauge",
        ),
        table(
            "In the time shown",
            "short",
            (_in_range("multilora_tenant_requests_total", "tenant"), "requests"),
            (_in_range("multilora_tenant_tokens_total", "tenant"), "tokens"),
            (_in_range("multilora_tenant_rejections_total", "tenant"), "refused"),
        ),
    ),
    (_JOB, _INSTANCE, Variable("tenant", "multilora_tenant_requests_total")),
)

ENGINE = Dashboard(
    "engine",
    "Engine",
    "What the engine's loop does: queue, batches, texts under way, caches and memory.",
    (
        Row("Queue"),
        lines("Since the last turn", "s", (_TURN_AGE, "{{instance}}"), limit=_STALLED),
        lines(
            "Requests",
            "short",
            (_of("multilora_requests_waiting"), "{{instance}} waiting"),
            (_of("multilora_requests_running"), "{{instance}} running"),
        ),
        lines("Queued sequences", "short", (_of("multilora_queued_sequences"), "{{instance}}")),
        lines("Queued tokens", "short", (_of("multilora_queued_tokens"), "{{instance}}")),
        lines("In the queue", "s", *_quantiles("multilora_stage_seconds", 'stage="queue"')),
        lines("Batches", "ops", (_rate("multilora_batch_forward_seconds_count", "instance"), "{{instance}}")),
        Row("Batches"),
        lines("Sequences in a batch", "short", *_quantiles("multilora_batch_sequences")),
        lines("Tokens in a batch", "short", *_quantiles("multilora_batch_tokens")),
        lines("Adapters in a batch", "short", *_quantiles("multilora_batch_adapters")),
        lines("Forward pass", "s", *_quantiles("multilora_batch_forward_seconds")),
        heatmap("Sequences in a batch", "short", _rate("multilora_batch_sequences_bucket", "le")),
        heatmap("Tokens in a batch", "short", _rate("multilora_batch_tokens_bucket", "le")),
        Row("Texts under way"),
        lines(
            "Generating",
            "short",
            (_of("multilora_generating_sequences"), "{{instance}} texts"),
            (_of("multilora_open_streams"), "{{instance}} streams"),
        ),
        lines(
            "How samples end",
            "ops",
            (_rate("multilora_finished_samples_total", "finish_reason"), "{{finish_reason}}"),
            stack=True,
        ),
        lines("Preemptions", "ops", (_rate("multilora_preemptions_total", "instance"), "{{instance}}")),
        Row("KV and prefix cache"),
        lines(
            "Blocks",
            "short",
            (_of("multilora_kv_blocks"), "{{instance}} all"),
            (_of("multilora_kv_blocks_used"), "{{instance}} used"),
            (_of("multilora_kv_blocks_cached"), "{{instance}} kept"),
        ),
        lines("Share in use", "percentunit", (_of("multilora_kv_used_ratio"), "{{instance}}")),
        lines(
            "Kept blocks that made room",
            "ops",
            (_rate("multilora_kv_block_evictions_total", "instance"), "{{instance}}"),
        ),
        lines(
            "Prompt tokens that the cache had",
            "percentunit",
            (
                _per(_rate("multilora_prompt_tokens_cached_total"), _rate("multilora_prompt_tokens_queried_total")),
                "share",
            ),
        ),
        Row("Accelerator, kernels and graphs"),
        lines(
            "Accelerator's memory",
            "bytes",
            (_of("multilora_accelerator_allocated_bytes"), "{{instance}} tensors"),
            (_of("multilora_accelerator_reserved_bytes"), "{{instance}} taken"),
            (_of("multilora_accelerator_capacity_bytes"), "{{instance}} all"),
        ),
        lines("Kernels compiled", "short", (_of("multilora_kernels_compiled_total"), "{{instance}}")),
        lines("CUDA graphs", "short", (_of("multilora_graphs"), "{{instance}}")),
        lines("Memory of CUDA graphs", "bytes", (_of("multilora_graph_bytes"), "{{instance}}")),
        lines(
            "Batches by CUDA graph, or not and why",
            "ops",
            (_rate("multilora_graph_steps_total"), "graph"),
            (_rate("multilora_eager_steps_total", "reason"), "eager: {{reason}}"),
            stack=True,
        ),
    ),
    (_JOB, _INSTANCE),
)

DASHBOARDS = (OVERVIEW, ADAPTERS, TENANTS, ENGINE)
