"""Usage per tenant and adapter, and its counters: exact, bounded, and never going down."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lora_runtime.errors import DeadlineExpired
from lora_runtime.generation import Generated, Generation, Sample
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.types import AdapterCard, AdapterId, BatchStats, ProblemType, Request, Result, Task, Timings
from lora_runtime.types import TokenSequence as Sequence
from server.metrics.series import SERIES
from server.tenancy.usage import OTHER_TENANTS, UsageEntry, UsageMeter
from server.tenancy.usage_metrics import NAMES, UsageMetrics

CARD = AdapterCard(Task.EMBED, (), ProblemType.SINGLE_LABEL, None, None, None)
NEWS = AdapterId("acme", "news", 1)


def request(adapter: AdapterId, *lengths: int) -> Request:
    sequences = tuple(Sequence((7,) * length, None) for length in lengths)
    return Request("id", adapter, Task.EMBED, sequences)


def answer(adapter: AdapterId, queue_s: float = 0.0, load_wait_s: float = 0.0, forward_s: float = 9.0) -> Result:
    return Result(adapter, "digest", CARD, (), Timings(queue_s, load_wait_s, forward_s))


def serve(meter: UsageMeter, adapter: AdapterId, *lengths: int) -> None:
    meter.on_result(request(adapter, *lengths), answer(adapter))


def fail(meter: UsageMeter, adapter: AdapterId) -> None:
    meter.on_result(request(adapter, 5), DeadlineExpired("late"))


def batch(num_tokens: int, forward_s: float) -> BatchStats:
    return BatchStats(num_sequences=1, num_tokens=num_tokens, num_adapters=1, forward_s=forward_s)


def one(meter: UsageMeter) -> UsageEntry:
    (entry,) = meter.snapshot(None)
    return entry


def test_requests_sequences_tokens_and_waits_are_summed() -> None:
    meter = UsageMeter(wall_clock=lambda: 1_700_000_000.0)
    meter.on_result(request(NEWS, 3, 4), answer(NEWS, queue_s=0.25, load_wait_s=2.0))
    meter.on_result(request(NEWS, 5), answer(NEWS, queue_s=0.5))
    fail(meter, NEWS)
    entry = one(meter)
    assert (entry.tenant, entry.adapter, entry.since_unix_s) == ("acme", NEWS, 1_700_000_000.0)
    counts = entry.counts
    assert (counts.requests_ok, counts.requests_failed) == (2, 1)
    assert (counts.sequences, counts.input_tokens, counts.output_tokens) == (3, 12, 0)
    assert (counts.queue_s, counts.load_wait_s) == (0.75, 2.0)


def test_generated_tokens_are_summed_over_samples() -> None:
    meter = UsageMeter()
    samples = tuple(Sample("x", (SampledToken(7),) * length, FinishReason.EOS) for length in (2, 3))
    asked = replace(
        request(NEWS, 4), task=Task.GENERATE, generation=Generation(SamplingParams(n=2), lambda: pytest.fail("no text"))
    )
    meter.on_result(asked, replace(answer(NEWS), outputs=(Generated(samples),)))
    counts = one(meter).counts
    assert (counts.sequences, counts.input_tokens, counts.output_tokens) == (1, 4, 5)
    meter.on_batch(batch(1, 0.5))  # the last token's batch: no more than the request took
    assert one(meter).counts.forward_s == pytest.approx(4.5)


def test_a_batchs_seconds_are_charged_by_tokens() -> None:
    meter = UsageMeter()
    legal = AdapterId("acme", "legal", 1)
    serve(meter, NEWS, 30)
    serve(meter, legal, 10)
    meter.on_batch(batch(40, 0.4))
    serve(meter, legal, 10)
    meter.on_batch(batch(100, 0.5))  # of which 90 belong to requests that are not answered yet
    charged = {entry.adapter: entry.counts.forward_s for entry in meter.snapshot("acme")}
    assert charged == {NEWS: pytest.approx(0.3), legal: pytest.approx(0.1 + 0.05)}


@given(st.lists(st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.floats(0.001, 1)), max_size=20))
def test_the_seconds_charged_are_the_seconds_spent(batches: list[tuple[list[int], float]]) -> None:
    meter = UsageMeter()
    for lengths, seconds in batches:
        for number, length in enumerate(lengths):
            serve(meter, AdapterId("acme", f"a{number}", 1), length)
        meter.on_batch(batch(sum(lengths), seconds))
    charged = sum(entry.counts.forward_s for entry in meter.snapshot(None))
    assert charged == pytest.approx(sum(seconds for _, seconds in batches))


def test_a_request_of_several_batches_is_charged_no_more_than_its_time() -> None:
    meter = UsageMeter()
    meter.on_result(request(NEWS, 1000, 1), answer(NEWS, forward_s=0.02))
    meter.on_batch(batch(1, 0.005))  # the last one carried the short sequence alone
    assert one(meter).counts.forward_s == 0.02


def test_without_reports_of_batches_memory_stays_bounded_and_time_is_charged_in_full() -> None:
    meter = UsageMeter()
    for _ in range(5000):
        meter.on_result(request(NEWS, 1), answer(NEWS, forward_s=1.0))
    assert one(meter).counts.forward_s == 4096


def test_who_pays_may_be_another_than_the_owner() -> None:
    meter = UsageMeter()
    meter.on_result(replace(request(NEWS, 5), tenant="globex"), answer(NEWS))
    assert meter.snapshot("acme") == []
    assert [(entry.tenant, entry.adapter) for entry in meter.snapshot("globex")] == [("globex", NEWS)]


def test_a_tenant_sees_its_own_and_all_are_in_order() -> None:
    meter = UsageMeter()
    for adapter in (AdapterId("b", "x", 1), AdapterId("a", "y", 10), AdapterId("a", "y", 2), AdapterId("a", "x", 1)):
        serve(meter, adapter, 1)
    assert [str(entry.adapter) for entry in meter.snapshot(None)] == ["a/x@1", "a/y@2", "a/y@10", "b/x@1"]
    assert [str(entry.adapter) for entry in meter.snapshot("b")] == ["b/x@1"]
    assert meter.snapshot("nobody") == []


def test_a_deleted_adapter_stays_in_the_account() -> None:
    meter = UsageMeter()
    serve(meter, NEWS, 5)
    meter.on_deleted(NEWS)
    assert one(meter).adapter == NEWS


def test_a_snapshot_does_not_change_later() -> None:
    meter = UsageMeter()
    serve(meter, NEWS, 5)
    before = one(meter)
    serve(meter, NEWS, 5)
    assert before.counts.requests_ok == 1


def test_adapters_beyond_the_bound_are_summed_per_tenant() -> None:
    meter = UsageMeter(max_entries=3)
    for tenant in ("a", "b"):
        for number in range(4):
            serve(meter, AdapterId(tenant, f"x{number}", 1), 10)
    entries = [(entry.tenant, entry.adapter and entry.adapter.name, entry.counts.input_tokens) for entry in all_(meter)]
    assert entries == [("a", "x0", 10), ("a", "x1", 10), ("a", "x2", 10), ("a", None, 10), ("b", None, 40)]
    serve(meter, AdapterId("a", "x0", 1), 10)
    assert meter.snapshot("a")[0].counts.input_tokens == 20, "what has an entry keeps it"


def all_(meter: UsageMeter) -> list[UsageEntry]:
    return meter.snapshot(None)


def test_memory_is_bounded_with_very_many_tenants() -> None:
    meter = UsageMeter(max_entries=100)
    for number in range(1000):
        serve(meter, AdapterId(f"t{number}", "x", 1), 1)
        fail(meter, AdapterId(f"t{number}", "x", 2))
    assert len(meter.snapshot(None)) <= 201
    totals = meter.take_active()
    assert len(totals) == 101
    assert sum(one.requests_ok for one in totals.values()) == 1000
    assert meter.take_active() == {}, "nobody asked since"
    assert meter.snapshot(OTHER_TENANTS)[0].counts.requests_failed == 900


def test_it_may_be_read_while_the_engine_counts() -> None:
    meter = UsageMeter()

    def count() -> None:
        for number in range(3000):
            serve(meter, AdapterId(f"t{number % 100}", f"x{number % 7}", 1), 2)
            meter.on_batch(batch(2, 0.001))

    engine = threading.Thread(target=count)
    engine.start()
    while engine.is_alive():
        for entry in meter.snapshot(None):
            assert entry.counts.input_tokens == 2 * entry.counts.sequences, "half of an update was read"
    engine.join()
    assert sum(totals.tokens for totals in meter.take_active().values()) == 6000


# Metrics


class Scraped:
    """A meter, its metrics, and what a scrape shows."""

    def __init__(self) -> None:
        self.meter = UsageMeter()
        self.metrics = UsageMetrics(self.meter)
        self.registry = CollectorRegistry()
        self.registry.register(self.metrics)

    def serve(self, tenant: str, number: int = 1) -> None:
        for _ in range(number):
            serve(self.meter, AdapterId(tenant, "x", 1), 10)

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def scrape(self) -> dict[tuple[str, ...], float]:
        """Values by the name without its prefix and the labels' values, in the order of SERIES."""
        return {
            (
                sample.name.removeprefix("multilora_tenant_"),
                *(sample.labels[label] for label in SERIES[sample.name].labels),
            ): (sample.value)
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def tenants(self) -> set[str]:
        return {key[1] for key in self.scrape()}


def test_counters_per_tenant() -> None:
    scraped = Scraped()
    scraped.serve("acme", 3)
    fail(scraped.meter, NEWS)
    scraped.metrics.count_rejection("globex", "tokens_per_minute")
    expected = {
        ("requests_total", "acme", "ok"): 3,
        ("requests_total", "acme", "error"): 1,
        ("tokens_total", "acme"): 30,
        ("rejections_total", "globex", "tokens_per_minute"): 1,
    }
    assert scraped.scrape() == expected
    assert scraped.scrape() == expected, "a scrape counts nothing"


def test_the_text_format_is_what_promtool_asks_for() -> None:
    scraped = Scraped()
    scraped.serve("acme")
    text = scraped.text()
    for name, series in {name: SERIES[name] for name in NAMES}.items():
        assert name.endswith("_total")
        assert f"# HELP {name} {series.help}\n# TYPE {name} counter\n" in text
        assert series.help.endswith(".")
    assert "_created" not in text


def test_the_busiest_have_series_and_the_rest_is_other() -> None:
    scraped = Scraped()
    for number in range(80):
        scraped.serve(f"t{number}", 1 if number < 30 else 2)
    assert scraped.tenants() == {"other", *(f"t{number}" for number in range(30, 80))}
    assert scraped.scrape()["requests_total", "other", "ok"] == 30


def test_a_tenant_that_becomes_busy_is_shown_and_those_that_were_stay() -> None:
    scraped = Scraped()
    for number in range(80):
        scraped.serve(f"t{number}", 1 if number < 30 else 2)
    scraped.scrape()
    scraped.serve("t0", 5)
    after = scraped.scrape()
    assert after["requests_total", "t0", "ok"] == 5
    assert after["requests_total", "other", "ok"] == 30, "what was counted as other stays there"
    assert len(scraped.tenants()) == 52


def test_no_more_than_two_hundred_tenants_are_ever_shown() -> None:
    scraped = Scraped()
    for number in range(400):
        scraped.serve(f"t{number:03}", 1 + number // 20)  # each group of twenty is busier than all before it
        if number % 20 == 19:
            scraped.scrape()
    assert len(scraped.tenants()) == 201
    assert sum(value for key, value in scraped.scrape().items() if key[0] == "requests_total") == 20 * sum(range(1, 21))


def test_a_tenant_called_other_is_one_of_the_others() -> None:
    scraped = Scraped()
    scraped.serve("other", 9)
    for number in range(60):
        scraped.serve(f"t{number}", 2)
    assert scraped.scrape()["requests_total", "other", "ok"] == 9 + 20
    assert scraped.text().count('requests_total{outcome="ok",tenant="other"}') == 1


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4), st.booleans()), max_size=60))
def test_counters_never_go_down_and_lose_nothing(steps: list[tuple[int, int, bool]]) -> None:
    scraped, before, total = Scraped(), {}, 0
    for number in range(55):
        scraped.serve(f"t{number}")
    for tenant, number, scrape in steps:
        scraped.serve(f"t{tenant}", number)
        scraped.metrics.count_rejection(f"t{300 - tenant}", "requests_per_second")
        total += number
        if scrape:
            after = scraped.scrape()
            assert all(after[key] >= value for key, value in before.items())
            before = after
    sums = {"requests_total": 0.0, "tokens_total": 0.0, "rejections_total": 0.0}
    for (name, *_), value in scraped.scrape().items():
        sums[name] += value
    assert sums == {
        "requests_total": 55 + total,
        "tokens_total": 10 * (55 + total),
        "rejections_total": len(steps),
    }


def test_refusals_of_very_many_tenants_stay_bounded() -> None:
    scraped = Scraped()
    for number in range(25_000):
        scraped.metrics.count_rejection(f"t{number}", "requests_per_second")
    scraped.scrape()
    scraped.metrics.count_rejection("t1", "requests_per_second")
    after = scraped.scrape()
    assert len(after) == 51
    assert sum(after.values()) == 25_001
