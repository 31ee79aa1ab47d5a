"""Three times what the server can answer, with deadlines: how much is answered in time, and how soon others know."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.bench.adapters.figures import at_least, at_most, percentile, spread
from server.bench.adapters.reference import Reference
from server.bench.tenants.asking import Outcome, Texts, busy, open_loop, tenants, texts_per_s
from server.bench.tenants.plan import DEADLINE_S, LIST_TEXTS, OVERLOAD, STEADY, TenantsBench
from server.bench.tenants.servers import TenantServer, alone, started
from server.bench.tenants.site import Site

_REFUSALS = ("DEADLINE_UNREACHABLE", "CAPACITY_EXCEEDED", "QUOTA_EXCEEDED")
_MIB = 1 << 20
_RSS_GROWTH_MIB = 64
_QUEUE_S = 1.0  # of work that the server with the short queue holds


@dataclass(slots=True)
class _Found:
    """Of one server."""

    peak: list[float] = field(default_factory=list[float])  # texts/s of the closed loop
    goodput: list[float] = field(default_factory=list[float])  # texts/s within their deadline
    rss_bytes: list[float] = field(default_factory=list[float])  # after each window
    outcomes: Counter[str] = field(default_factory=Counter[str])
    refused_s: list[float] = field(default_factory=list[float])
    answered_s: list[float] = field(default_factory=list[float])
    late: list[float] = field(default_factory=list[float])


def measure_overload(
    bench: TenantsBench, site: Site, reference: Reference, default: TenantServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Closed loop and open loop in turn, by server."""
    measuring = _Measuring(bench, site, reference)
    progress("capacity with lists")
    asyncio.run(measuring.closed(default, _Found()))
    measuring.capacity = max(asyncio.run(measuring.closed(default, _Found())), LIST_TEXTS)
    queue = measuring.queue = max(int(_QUEUE_S * measuring.capacity), len(STEADY) * LIST_TEXTS)
    short = ("--max-queued-sequences", str(queue), "--max-inputs", str(LIST_TEXTS))
    others = [
        TenantServer(bench.base, site, bench.threads, "no-early-refusal", "--refuse-early", "no"),
        TenantServer(bench.base, site, bench.threads, "short-queue", *short),
    ]
    servers = [default, *others]
    found = {server.name: _Found() for server in servers}
    with started(others):
        for turn in range(bench.scale.overload_pairs):
            for server in servers:
                progress(f"overload, {server.name}, {turn + 1} of {bench.scale.overload_pairs}")
                with alone(server, servers):
                    asyncio.run(measuring.closed(server, found[server.name]))
                    asyncio.run(measuring.open(server, found[server.name]))
    return _result(found, measuring.capacity, queue)


class _Measuring:
    """Windows of one server at a time."""

    def __init__(self, bench: TenantsBench, site: Site, reference: Reference) -> None:
        self._scale = bench.scale
        self._site = site
        self._reference = reference
        self._texts = Texts(2, len(reference.texts))
        self.capacity = 0.0  # texts/s
        self.queue = bench.scale.in_flight  # sequences that the server with the short queue holds

    async def closed(self, server: TenantServer, found: _Found) -> float:
        """At most as many texts in flight as the shortest queue takes: refusals would cost the peak."""
        scale = self._scale
        in_flight = min(scale.in_flight, self.queue)
        async with tenants(STEADY, server.target, self._site, self._reference) as callers:
            start = time.perf_counter() + scale.lead_s
            per_s, _ = await busy(callers.values(), in_flight, start, start + scale.closed_s, self._texts, LIST_TEXTS)
        found.peak.append(per_s)
        return per_s

    async def open(self, server: TenantServer, found: _Found) -> None:
        """The lead is as long as a deadline at least: until then nobody has waited for too long."""
        outcomes: list[Outcome] = []
        rate = OVERLOAD * self.capacity / LIST_TEXTS / len(STEADY)
        async with tenants(STEADY, server.target, self._site, self._reference) as callers:
            begin = time.perf_counter() + 0.1
            start = begin + self._scale.lead_s
            end = start + self._scale.open_s
            await asyncio.gather(
                *(
                    open_loop(
                        caller, self._texts.arrivals(rate, begin, end), self._texts, outcomes, LIST_TEXTS, DEADLINE_S
                    )
                    for caller in callers.values()
                )
            )
        counted = [outcome for outcome in outcomes if outcome.due >= start]
        found.goodput.append(texts_per_s(outcomes, start, end))
        found.outcomes.update(outcome.code for outcome in counted)
        found.refused_s += [outcome.ended - outcome.sent for outcome in counted if outcome.code in _REFUSALS]
        found.answered_s += [outcome.ended - outcome.sent for outcome in counted if outcome.code == "OK"]
        found.late += [outcome.sent - outcome.due for outcome in counted]
        await asyncio.to_thread(server.wait_empty)
        found.rss_bytes.append(float(server.rss_bytes()))


def _result(found: dict[str, _Found], capacity: float, short_queue: int) -> dict[str, Any]:
    figures = {name: _figures(of_server) for name, of_server in found.items()}
    targets: dict[str, Any] = {}
    for name, figure in figures.items():
        targets[f"goodput ÷ peak, {name}"] = at_least(figure["ratio"]["median"], 0.8)
        if "refused_seconds" in figure:
            targets[f"median latency of a refusal, {name}, seconds"] = at_most(figure["refused_seconds"]["p50"], 0.01)
    growth = max(figure["rss_growth_mib"] for figure in figures.values())
    targets["growth of a server's memory, MiB"] = at_most(growth, _RSS_GROWTH_MIB)
    return {
        "capacity_texts_per_s": capacity,
        "offered_texts_per_s": OVERLOAD * capacity,
        "deadline_seconds": DEADLINE_S,
        "short_queue_sequences": short_queue,
        "servers": figures,
        "targets": targets,
    }


def _figures(found: _Found) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "peak_texts_per_s": spread(found.peak),
        "goodput_texts_per_s": spread(found.goodput),
        "ratio": spread([good / max(peak, 1.0) for good, peak in zip(found.goodput, found.peak, strict=True)]),
        "outcomes": dict(found.outcomes),
        "rss_bytes": found.rss_bytes,
        "rss_growth_mib": (found.rss_bytes[-1] - found.rss_bytes[0]) / _MIB,
        "client_late_p99_seconds": percentile(found.late, 99),
    }
    for name, seconds in (("refused_seconds", found.refused_s), ("answered_seconds", found.answered_s)):
        if seconds:
            figures[name] = {f"p{p}": percentile(seconds, p) for p in (50, 99)} | {"count": len(seconds)}
    return figures
