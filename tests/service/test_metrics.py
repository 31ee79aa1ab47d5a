"""/metrics, as Prometheus reads it."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import SERIES
from server.pb.multilora.v1 import adapters_pb2
from server.tenancy.usage_metrics import SERIES as TENANT_SERIES
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
    declared = {**SERIES, **TENANT_SERIES}
    assert ours == {name.removesuffix("_total") for name in declared}
    for name, series in declared.items():
        assert re.fullmatch(r"multilora_[a-z_]+", name)
        assert series.help.endswith(".")
        assert families[name.removesuffix("_total")].documentation == series.help
    assert "adapter=" not in text, "no series has a label per adapter"
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text
