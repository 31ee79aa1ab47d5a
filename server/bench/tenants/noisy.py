"""Steady tenants alone, beside a noisy one, and beside a noisy one with a limit, in turn and by token budget."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.bench.adapters.figures import at_most, percentile, spread
from server.bench.adapters.reference import Reference
from server.bench.tenants.asking import OK, Outcome, Texts, busy, open_loop, tenants
from server.bench.tenants.plan import LIMITED, NOISY, NOISY_RATE, STEADY, STEADY_LOAD, TenantsBench
from server.bench.tenants.servers import TenantServer, alone, started
from server.bench.tenants.site import Site

_LEAST_PER_S = 10.0  # texts; a window of the small scale may be too short for one answer
_NEIGHBOURS = {"alone": None, "noisy": NOISY, "limited": LIMITED}


@dataclass(slots=True)
class _Found:
    """Of one token budget."""

    texts_per_s: list[float] = field(default_factory=list[float])
    steady: dict[str, list[list[Outcome]]] = field(default_factory=dict[str, list[list[Outcome]]])
    neighbours: Counter[str] = field(default_factory=Counter[str])  # outcomes of the noisy ones
    late: list[float] = field(default_factory=list[float])  # seconds that the client sent after it was due


def measure_noisy(
    bench: TenantsBench, site: Site, reference: Reference, default: TenantServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    """p50 and p99 of the steady tenants' calls."""
    scale = bench.scale
    others = [
        TenantServer(bench.base, site, bench.threads, f"budget-{budget}", "--token-budget", str(budget))
        for budget in scale.token_budgets[1:]
    ]
    servers = [default, *others]
    found = [_Found() for _ in servers]
    measuring = _Measuring(bench, site, reference)
    with started(others):
        for turn in range(scale.capacity_windows + 1):
            for server, of_budget in zip(servers, found, strict=True):
                progress(f"capacity, {server.name}, {turn} of {scale.capacity_windows}")
                with alone(server, servers):
                    capacity = asyncio.run(measuring.capacity(server))
                if turn:  # the first loads the adapters
                    of_budget.texts_per_s.append(capacity)
        measuring.rate = STEADY_LOAD * max(statistics.median(found[0].texts_per_s), _LEAST_PER_S) / len(STEADY)
        for turn in range(scale.noisy_pairs):
            for server, of_budget in zip(servers, found, strict=True):
                progress(f"noisy, {server.name}, {turn + 1} of {scale.noisy_pairs}")
                with alone(server, servers):
                    for name, neighbour in _NEIGHBOURS.items():
                        asyncio.run(measuring.window(server, name, neighbour, of_budget))
    budgets = {str(budget): _figures(of_budget) for budget, of_budget in zip(scale.token_budgets, found, strict=True)}
    ratios = budgets[str(scale.token_budgets[0])]["ratio_p99"]
    return {
        "steady_calls_per_s": measuring.rate * len(STEADY),
        "noisy_calls_per_s": measuring.rate * NOISY_RATE,
        "budgets": budgets,
        "targets": {
            "p99 of steady tenants beside a noisy one ÷ alone": at_most(ratios["noisy"]["median"], 2.0),
            "the same, the noisy one limited": at_most(ratios["limited"]["median"], 2.0),
            "failed calls of steady tenants": at_most(sum(sum(b["failures"].values()) for b in budgets.values()), 0),
        },
    }


class _Measuring:
    """Windows of one server at a time."""

    def __init__(self, bench: TenantsBench, site: Site, reference: Reference) -> None:
        self._scale = bench.scale
        self._site = site
        self._reference = reference
        self._texts = Texts(0, len(reference.texts))
        self.rate = 0.0  # calls/s of one steady tenant

    async def capacity(self, server: TenantServer) -> float:
        scale = self._scale
        async with tenants(STEADY, server.target, self._site, self._reference) as callers:
            start = time.perf_counter() + scale.lead_s
            per_s, _ = await busy(callers.values(), scale.in_flight, start, start + scale.capacity_s, self._texts)
        return per_s

    async def window(self, server: TenantServer, name: str, neighbour: str | None, found: _Found) -> None:
        """One window; what the neighbour still has in flight at its end is cancelled."""
        names = STEADY if neighbour is None else (*STEADY, neighbour)
        async with tenants(names, server.target, self._site, self._reference) as callers:
            begin = time.perf_counter() + 0.1
            start = begin + self._scale.lead_s
            end = start + self._scale.noisy_window_s
            noise: asyncio.Task[None] | None = None
            heard: list[Outcome] = []
            if neighbour is not None:
                due = self._texts.arrivals(NOISY_RATE * self.rate, begin, end)
                due = [begin] * self._scale.noisy_burst + due
                noise = asyncio.create_task(open_loop(callers[neighbour], due, self._texts, heard))
            outcomes: list[Outcome] = []
            arrivals = {tenant: self._texts.arrivals(self.rate, begin, end) for tenant in STEADY}
            await asyncio.gather(
                *(open_loop(callers[tenant], due, self._texts, outcomes) for tenant, due in arrivals.items())
            )
            if noise is not None:
                await _end(noise)
                found.neighbours.update(outcome.code for outcome in heard)
        counted = [outcome for outcome in outcomes if outcome.due >= start]
        found.steady.setdefault(name, []).append(counted)
        found.late += [outcome.sent - outcome.due for outcome in counted]
        await asyncio.to_thread(server.wait_empty)


async def _end(noise: asyncio.Task[None]) -> None:
    noise.cancel()
    await asyncio.wait([noise])
    if not noise.cancelled():
        noise.result()  # raises when an answer was wrong


def _figures(found: _Found) -> dict[str, Any]:
    seconds = {
        name: [[outcome.seconds for outcome in calls if outcome.code == OK] for calls in windows]
        for name, windows in found.steady.items()
    }
    of: dict[str, dict[str, list[float]]] = {
        f"p{percent}": {name: [percentile(calls, percent) for calls in windows] for name, windows in seconds.items()}
        for percent in (50, 99)
    }
    failures = Counter(outcome.code for windows in found.steady.values() for calls in windows for outcome in calls)
    del failures[OK]
    return {
        "texts_per_s": spread(found.texts_per_s),
        **{f"{p}_seconds": {name: spread(values) for name, values in by.items()} for p, by in of.items()},
        **{f"ratio_{p}": {name: _ratio(by, name) for name in ("noisy", "limited")} for p, by in of.items()},
        "calls": {name: [len(calls) for calls in windows] for name, windows in seconds.items()},
        "failures": dict(failures),
        "neighbours": dict(found.neighbours),
        "client_late_p99_seconds": percentile(found.late, 99),
    }


def _ratio(by: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Pair by pair."""
    return spread([b / a for a, b in zip(by["alone"], by[name], strict=True)])
