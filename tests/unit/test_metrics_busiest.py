"""Counters by adapter: who is shown, what is counted where, and that there is a bound."""

from __future__ import annotations

from collections import Counter

import pytest

from lora_runtime.types import AdapterId
from server.metrics.busiest import REQUESTS, BusiestAdapters


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def adapter(number: int) -> AdapterId:
    return AdapterId("acme", f"a{number}", 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def busiest(clock: Clock) -> BusiestAdapters:
    return BusiestAdapters(3, clock)


def serve(busiest: BusiestAdapters, number: int, times: int = 1) -> None:
    for _ in range(times):
        busiest.count(adapter(number), ok=True, input_tokens=10, generated_tokens=2)


def shown(busiest: BusiestAdapters) -> dict[str, float]:
    """Requests that were answered, by the adapter's label."""
    return {labels[1]: value for name, labels, value in busiest.samples() if name == REQUESTS and labels[3] == "ok"}


def test_those_that_come_first_are_counted_from_their_first_request(busiest: BusiestAdapters) -> None:
    for number in (1, 2, 3, 4, 5):
        serve(busiest, number, number)
    assert shown(busiest) == {"a1": 1, "a2": 2, "a3": 3, "other": 4 + 5}


def test_failures_and_tokens_have_series_of_their_own(busiest: BusiestAdapters) -> None:
    serve(busiest, 1, 3)
    busiest.count(adapter(1), ok=False)
    values = {(name.removeprefix("multilora_adapter_"), labels): value for name, labels, value in busiest.samples()}
    assert values["requests_total", ("acme", "a1", "1", "error")] == 1
    assert values["input_tokens_total", ("acme", "a1", "1")] == 30
    assert values["generated_tokens_total", ("acme", "a1", "1")] == 6


def test_a_busier_adapter_takes_the_place_of_the_least_busy(busiest: BusiestAdapters, clock: Clock) -> None:
    for number in (1, 2, 3):
        serve(busiest, number, 10 * number)
    serve(busiest, 4, 100)
    assert "a4" not in shown(busiest), "they are not chosen at every scrape"
    clock.now += 10
    assert shown(busiest) == {"a2": 20, "a3": 30, "a4": 0, "other": 100}
    serve(busiest, 4, 5)
    serve(busiest, 1, 5)
    assert shown(busiest) == {"a2": 20, "a3": 30, "a4": 5, "other": 105}


def test_two_alike_do_not_take_turns(busiest: BusiestAdapters, clock: Clock) -> None:
    for number in (1, 2, 3):
        serve(busiest, number, 20)
    serve(busiest, 4, 25)
    clock.now += 10
    assert "a4" not in shown(busiest)


def test_what_was_long_ago_counts_less(busiest: BusiestAdapters, clock: Clock) -> None:
    for number in (1, 2, 3):
        serve(busiest, number, 1000)
    clock.now += 6000  # ten half-lives: 1,000 requests are worth one of now
    serve(busiest, 4, 3)
    assert "a4" in shown(busiest)


@pytest.mark.parametrize("months", [1, 40])
def test_years_of_service_overflow_nothing(busiest: BusiestAdapters, clock: Clock, months: int) -> None:
    serve(busiest, 1, 5)
    for _ in range(months):
        clock.now += 30 * 86_400
        serve(busiest, 2)
    assert shown(busiest) == {"a1": 5, "a2": months, "other": 0}


def test_no_counter_falls_and_every_request_is_counted_once(busiest: BusiestAdapters, clock: Clock) -> None:
    before: dict[str, float] = {}
    last: Counter[str] = Counter()
    for step in range(200):
        serve(busiest, step * step % 11, 1 + step % 5)
        clock.now += 7
        now = shown(busiest)
        assert len(now) <= 4
        assert all(now[name] >= before.get(name, 0) for name in now)
        before |= now
        last.update({"requests": 1 + step % 5})
    assert sum(before.values()) == last["requests"]


def test_the_series_of_a_deleted_adapter_go_with_it(busiest: BusiestAdapters) -> None:
    serve(busiest, 1)
    serve(busiest, 2)
    busiest.forget(adapter(1))
    busiest.count(None, ok=True)  # it was on its way when its adapter was deleted
    assert shown(busiest) == {"a2": 1, "other": 1}
    serve(busiest, 3)
    assert "a3" in shown(busiest), "there is room again"
