"""Simulations with a virtual clock: what tenants get of the engine, and how long they wait, under any skew."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from lora_runtime.scheduler import CREDIT_TOKENS, TURN_TOKENS, Scheduler
from lora_runtime.tickets import Ticket, Work
from lora_runtime.types import AdapterId, Request, Task, TokenSequence

BUDGET = 1024  # tokens a batch
TOKENS_PER_S = 10_000.0


@dataclass
class Arrival:
    at: float
    tenant: str
    adapter: str = "a"
    lengths: tuple[int, ...] = (32,)
    priority: int = 0


@dataclass
class Outcome:
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # until the last batch has ended
    tokens: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_adapter: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def p99(self, *tenants: str) -> float:
        waits = sorted(wait for tenant in tenants for wait in self.waits[tenant])
        return waits[min(len(waits) - 1, int(0.99 * len(waits)))]


def simulate(
    arrivals: Iterable[Arrival],
    until: float,
    *,
    weights: dict[str, float] | None = None,
    budget: int = BUDGET,
    is_ready: Callable[[AdapterId, float], bool] = lambda _adapter, _now: True,
) -> Outcome:
    """An engine that runs its batches one after the other, TOKENS_PER_S tokens a second."""
    scheduler = Scheduler(budget, 256, lambda tenant: (weights or {}).get(tenant, 1.0))
    outcome, pending, now = Outcome(), sorted(arrivals, key=lambda a: a.at), 0.0
    names, at = itertools.count(), 0
    while now < until:
        while at < len(pending) and pending[at].at <= now:
            arrival = pending[at]
            sequences = tuple(TokenSequence((1,) * n, None) for n in arrival.lengths)
            adapter = AdapterId(arrival.tenant, arrival.adapter, 1)
            request = Request(f"{next(names)}", adapter, Task.CLASSIFY, sequences, priority=arrival.priority)
            scheduler.add(request, Future(), arrival.at)
            at += 1
        work = scheduler.schedule(lambda adapter: is_ready(adapter, now))  # noqa: B023 - called at once
        if not work:
            now = pending[at].at if at < len(pending) else until
            continue
        now += sum(item.num_tokens for item in work) / TOKENS_PER_S
        for item in work:
            outcome.tokens[item.ticket.adapter.tenant] += item.num_tokens
            outcome.by_adapter[item.ticket.adapter.tenant, item.ticket.adapter.name] += item.num_tokens
        for ticket in {item.ticket: None for item in work}:
            if not ticket.num_left and not ticket.done:
                outcome.waits[ticket.adapter.tenant].append(now - ticket.submitted_at)
                scheduler.finish(ticket)
    return outcome


def steady(tenant: str, per_s: float, until: float, seed: int, **fields: object) -> list[Arrival]:
    """Poisson arrivals."""
    draw, now, found = random.Random(seed), 0.0, list[Arrival]()
    while (now := now + draw.expovariate(per_s)) < until:
        found.append(Arrival(now, tenant, **fields))  # pyright: ignore[reportArgumentType]
    return found


def jain(values: Iterable[float]) -> float:
    got = list(values)
    return sum(got) ** 2 / (len(got) * sum(value * value for value in got))


@pytest.mark.parametrize(("budget", "bound"), [(64, 1.5), (128, 1.5), (256, 2.0)])
def test_a_tenant_at_ten_times_the_load_does_not_make_nine_others_wait(budget: int, bound: float) -> None:
    """A batch that runs is waited for: the larger it is, the more of that is seen beside what they wait alone."""
    seconds, per_s = 60.0, 27.0  # the nine: 78 % of the engine
    calm = [a for n in range(9) for a in steady(f"t{n}", per_s, seconds, n)]
    alone = simulate(calm, seconds, budget=budget)
    noisy = simulate([*calm, *steady("noisy", 10 * per_s, seconds, 99)], seconds, budget=budget)
    others = tuple(f"t{n}" for n in range(9))
    assert noisy.p99(*others) <= bound * alone.p99(*others)
    for tenant in others:
        assert noisy.p99(tenant) <= 2 * alone.p99(*others), f"{tenant} waits"
    assert noisy.p99("noisy") > 10 * noisy.p99("t0"), "the noisy one waits for itself"


def test_a_burst_of_long_requests_does_not_make_short_ones_of_others_wait() -> None:
    burst = [Arrival(1.0, "bulk", lengths=(256,) * 200) for _ in range(20)]
    outcome = simulate([*burst, *steady("quick", 20, 30, 1)], 30)
    assert outcome.p99("quick") <= 3 * BUDGET / TOKENS_PER_S


@pytest.mark.parametrize("lengths", [(32,), (8, 100, 3), (200, 200)])
def test_weights_are_shares(lengths: tuple[int, ...]) -> None:
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    backlog = [Arrival(0.0, tenant, lengths=lengths) for tenant in weights for _ in range(6000)]
    outcome = simulate(backlog, 20.0, weights=weights)
    total = sum(outcome.tokens.values())
    for tenant, weight in weights.items():
        assert outcome.tokens[tenant] / total == pytest.approx(weight / 7, rel=0.05)
    assert jain(outcome.tokens[tenant] / weight for tenant, weight in weights.items()) >= 0.95


def test_service_is_even_between_tenants_whose_requests_differ_in_every_way() -> None:
    draw = random.Random(5)
    tenants = {f"t{n}": (draw.randint(1, 6), draw.choice((4, 30, 250))) for n in range(20)}
    backlog = [
        Arrival(0.0, tenant, f"a{i % 5}", (length,) * count)
        for tenant, (count, length) in tenants.items()
        for i in range(60_000 // (count * length))
    ]
    outcome = simulate(backlog, 20.0)
    assert jain(outcome.tokens[tenant] for tenant in tenants) >= 0.95
    most, least = max(outcome.tokens.values()), min(outcome.tokens.values())
    assert most - least <= 2 * (TURN_TOKENS + 250), "the bound that the module promises"


def test_a_thousand_tenants_with_one_request_each_are_served_in_order_of_their_arrival() -> None:
    outcome = simulate([Arrival(n * 1e-6, f"t{n}") for n in range(1000)], 10.0)
    ends = [n * 1e-6 + outcome.waits[f"t{n}"][0] for n in range(1000)]
    assert max(ends) <= 1000 * 32 / TOKENS_PER_S + 2 * BUDGET / TOKENS_PER_S
    assert ends == pytest.approx(sorted(ends))


def test_one_that_asks_for_little_goes_before_those_that_have_had_more() -> None:
    backlog = [Arrival(0.0, f"t{n}", lengths=(32,) * 500) for n in range(50)]
    outcome = simulate([*backlog, Arrival(10.0, "new")], 13.0)
    assert outcome.waits["new"][0] <= 2.5 * BUDGET / TOKENS_PER_S


def add(scheduler: Scheduler, name: str, tenant: str, length: int = 32) -> Ticket:
    sequences = (TokenSequence((1,) * length, None),)
    return scheduler.add(Request(name, AdapterId(tenant, "a", 1), Task.CLASSIFY, sequences), Future(), 0.0)


def run(scheduler: Scheduler) -> list[Work]:
    work = scheduler.schedule(lambda _adapter: True)
    for item in work:
        scheduler.finish(item.ticket)
    return work


def test_a_backlog_does_not_fill_up_the_batch_of_one_that_asks_for_little() -> None:
    scheduler = Scheduler(BUDGET, 256)
    for n in range(1000):
        add(scheduler, f"n{n}", "noisy")
    for _ in range(5):
        assert sum(item.num_tokens for item in run(scheduler)) == BUDGET, "alone, it has the whole batch"
    add(scheduler, "q", "quick")
    work = run(scheduler)
    assert work[0].ticket.adapter.tenant == "quick"
    assert sum(item.num_tokens for item in work) <= 32 + BUDGET // 4 + TURN_TOKENS
    assert sum(item.num_tokens for item in run(scheduler)) == BUDGET


def test_one_that_was_forgotten_comes_back_with_a_bounded_credit() -> None:
    """Also when it was served in the last batch, and is forgotten as it comes back."""
    scheduler = Scheduler(BUDGET, 256)
    for n in range(3000):  # alone, for long: the level is far above 0
        add(scheduler, f"h{n}", "heavy")
        run(scheduler)
    for n in range(100):
        add(scheduler, f"t{n}", f"t{n}", 1)
    add(scheduler, "b", "back", 1)
    while scheduler.open_tickets():
        run(scheduler)
    add(scheduler, "l", "long", 4096)  # into an idle engine: all others have their credit back
    add(scheduler, "b2", "back")
    for n in range(1000):
        add(scheduler, f"h{n}", "heavy")
        add(scheduler, f"c{n}", "back")
    got: Counter[str] = Counter()
    for _ in range(20):
        for item in run(scheduler):
            got[item.ticket.adapter.tenant] += item.num_tokens
    assert abs(got["back"] - got["heavy"]) <= CREDIT_TOKENS + 2 * TURN_TOKENS


def test_what_fits_into_one_batch_is_not_spread_over_two() -> None:
    scheduler = Scheduler(BUDGET, 256)
    for n in range(200):
        add(scheduler, f"n{n}", "noisy")
    while scheduler.open_tickets():
        run(scheduler)
    add(scheduler, "q", "quick")
    for n in range(BUDGET // 32 - 1):
        add(scheduler, f"m{n}", "noisy")
    assert len(run(scheduler)) == BUDGET // 32


def test_one_that_used_an_idle_engine_goes_before_a_backlog_as_if_it_had_not() -> None:
    scheduler = Scheduler(BUDGET, 256)
    for n in range(500):
        add(scheduler, f"s{n}", "steady")
        run(scheduler)
    for n in range(500):
        add(scheduler, f"n{n}", "noisy")
    for _ in range(4):  # what it may send at once when it comes back
        run(scheduler)
    add(scheduler, "s", "steady")
    assert "steady" in {item.ticket.adapter.tenant for item in run(scheduler)}


def test_idling_earns_a_bounded_credit() -> None:
    """One that was away for long gets its share when it is back, and not what it left before."""
    busy = [Arrival(0.0, "busy") for _ in range(20_000)]
    back = [Arrival(10.0, "back") for _ in range(10_000)]
    outcome = simulate([*busy, *back], 20.0)
    half = 10 * TOKENS_PER_S / 2
    assert half - BUDGET <= outcome.tokens["back"] <= half + CREDIT_TOKENS + BUDGET


def test_a_tenant_whose_adapter_was_loading_gets_its_share_and_does_not_catch_up() -> None:
    backlog = [Arrival(0.0, tenant) for tenant in ("cold", "warm") for _ in range(20_000)]
    outcome = simulate(backlog, 20.0, is_ready=lambda adapter, now: adapter.tenant == "warm" or now >= 10)
    half = 10 * TOKENS_PER_S / 2
    assert half - BUDGET <= outcome.tokens["cold"] <= half + CREDIT_TOKENS + BUDGET


def test_a_tenants_adapters_share_what_it_gets() -> None:
    flood = [Arrival(0.0, "t", "flood") for _ in range(20_000)]
    drip = steady("t", 20, 20, 3, adapter="drip")
    outcome = simulate([*flood, *drip], 20.0)
    asked = sum(sum(a.lengths) for a in drip)
    assert outcome.by_adapter["t", "drip"] >= 0.97 * asked, "an adapter waits behind its sibling"


def test_a_high_priority_goes_first_within_its_tenant_and_stops_nobody() -> None:
    low = [Arrival(0.0, "t", "low") for _ in range(20_000)]
    high = [Arrival(0.0, "t", "high", priority=2) for _ in range(20_000)]
    other = [Arrival(0.0, "other") for _ in range(20_000)]
    outcome = simulate([*low, *high, *other], 20.0)
    assert outcome.tokens["t"] == pytest.approx(outcome.tokens["other"], rel=0.02), (
        "a priority is its tenant's own matter"
    )
    assert outcome.by_adapter["t", "high"] / outcome.by_adapter["t", "low"] == pytest.approx(16, rel=0.1)


def test_what_is_remembered_of_tenants_that_are_gone_is_bounded() -> None:
    scheduler = Scheduler(BUDGET, 256)
    for n in range(5000):
        sequences = (TokenSequence((1,) * 32, None),)
        ticket = scheduler.add(Request(f"{n}", AdapterId(f"t{n}", "a", 1), Task.CLASSIFY, sequences), Future(), 0.0)
        held = scheduler.add(Request(f"h{n}", AdapterId("held", "a", 1), Task.CLASSIFY, sequences), Future(), 0.0)
        del held
        for item in scheduler.schedule(lambda _adapter: True):
            if item.ticket is ticket:
                scheduler.finish(ticket)
    assert len(scheduler._tenants) < 50
