"""/metrics, as Prometheus reads it."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from lora_runtime.decoding import GenerationStats
from lora_runtime.kv_blocks import BlockStats
from lora_runtime.types import RunnerStats
from server.metrics.series import SERIES, Kind, Page
from server.pb.multilora.v1 import adapters_pb2
from tests.service.fake_runtime import RESIDENT_BYTES
from tests.service.harness import Harness, classify_request, failure_of

CLASSIFY = "multilora.v1.InferenceService/Classify"


async def test_requests_are_counted_by_method_and_code(server: Harness) -> None:
    await server.inference.Classify(classify_request("spam", "one"))
    await server.inference.Classify(classify_request("spam", "one"))
    await failure_of(server.inference.Classify(classify_request("absent", "one")))
    counted = 'multilora_requests_total{{code="{}",method="{}"}}'
    assert await server.sample(counted.format("OK", CLASSIFY)) == 2
    assert await server.sample(counted.format("NOT_FOUND", CLASSIFY)) == 1
    assert await server.sample(f'multilora_request_seconds_count{{method="{CLASSIFY}"}}') == 3


async def test_stages_and_batches_are_observed(server: Harness) -> None:
    await server.inference.Classify(classify_request("spam", "one", "two words"))
    for stage in ("tokenize", "queue", "load_wait", "forward", "interpret"):
        assert await server.sample(f'multilora_stage_seconds_count{{stage="{stage}"}}') == 1
    assert await server.sample("multilora_batch_sequences_sum") == 2
    assert await server.sample("multilora_batch_tokens_sum") == 7
    assert await server.sample("multilora_batch_adapters_sum") == 1
    assert await server.sample('multilora_stage_seconds_bucket{le="0.0001",stage="load_wait"}') == 1


async def test_adapters_are_counted_by_state_and_bytes(server: Harness) -> None:
    in_state = 'multilora_adapters{{state="{}"}}'
    assert await server.sample(in_state.format("REGISTERED")) == 4
    assert await server.sample(in_state.format("FAILED")) == 1
    assert await server.sample(in_state.format("READY")) == 0
    await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter="spam", wait=True))
    assert await server.sample(in_state.format("REGISTERED")) == 3
    assert await server.sample(in_state.format("READY")) == 1
    assert await server.sample("multilora_arena_used_bytes") == RESIDENT_BYTES
    assert await server.sample("multilora_adapter_load_seconds_count") == 1
    await server.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter="spam"))
    assert await server.sample("multilora_arena_used_bytes") == 0
    failures = 'multilora_adapter_load_failures_total{reason="JSON_INVALID"}'
    assert await server.sample(failures) == 1


async def test_every_series_is_declared_documented_and_well_named(server: Harness) -> None:
    await server.inference.Classify(classify_request("spam", "one"))
    text = await server.metrics()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ours = {name for name in families if name.startswith("multilora_")}
    declared = {name: series for name, series in SERIES.items() if series.page is not Page.ROUTER}
    assert ours == {name.removesuffix("_total") for name in declared}
    for name, series in declared.items():
        family = families[name.removesuffix("_total")]
        assert re.fullmatch(r"multilora_[a-z_]+", name)
        assert series.help.endswith(".")
        assert (family.documentation, family.type) == (series.help, series.kind)
        assert name.endswith("_total") == (series.kind is Kind.COUNTER)
        assert bool(series.buckets) == (series.kind is Kind.HISTOGRAM)
        assert series.unit not in ("seconds", "bytes", "ratio") or f"_{series.unit}" in name
        if series.kind is Kind.HISTOGRAM:
            assert not {"adapter", "tenant"} & {*series.labels}
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text


async def test_what_the_runner_did_is_read_at_each_scrape(server: Harness) -> None:
    assert await server.sample("multilora_kernels_compiled_total") == 0
    server.runtime.runner_stats = RunnerStats(7, 3, 4096, 12, {"size": 2, "extras": 0})
    assert await server.sample("multilora_kernels_compiled_total") == 7
    assert await server.sample("multilora_graphs") == 3
    assert await server.sample("multilora_graph_bytes") == 4096
    assert await server.sample("multilora_graph_steps_total") == 12
    assert await server.sample('multilora_eager_steps_total{reason="size"}') == 2
    assert await server.sample('multilora_eager_steps_total{reason="extras"}') == 0


async def test_what_the_kv_cache_holds_is_read_at_each_scrape(server: Harness) -> None:
    assert await server.sample("multilora_kv_blocks") == 0
    server.engine.kv_stats = GenerationStats(2, 3, 5, BlockStats(100, 20, 30, 50, 640, 1000, 7))
    assert await server.sample("multilora_kv_blocks") == 100
    assert await server.sample("multilora_kv_blocks_used") == 20
    assert await server.sample("multilora_kv_blocks_cached") == 30
    assert await server.sample("multilora_generating_sequences") == 3
    assert await server.sample("multilora_prompt_tokens_queried_total") == 1000
    assert await server.sample("multilora_prompt_tokens_cached_total") == 640
    assert await server.sample("multilora_preemptions_total") == 5


async def test_kernels_are_warm_before_the_server_says_that_it_serves(server: Harness) -> None:
    assert server.runtime.warmed_up_with is not None
