"""Tenants of weights 1, 2 and 4 that all want more than there is: who gets how many tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from server.bench.adapters.figures import at_most
from server.bench.adapters.reference import Reference
from server.bench.tenants.asking import OK, Outcome, Texts, closed_loop, tenants
from server.bench.tenants.plan import WEIGHTS, TenantsBench
from server.bench.tenants.servers import TenantServer
from server.bench.tenants.site import Site

_LIST_TEXTS = 4


def measure_shares(
    bench: TenantsBench, site: Site, reference: Reference, server: TenantServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Each keeps `in_flight` texts in flight, more than its share of two batches."""
    progress("shares by weight")
    tokens = asyncio.run(_measure(bench, site, reference, server))
    total, weights = sum(tokens.values()), sum(WEIGHTS.values())
    shares = {tenant: tokens[tenant] / total for tenant in WEIGHTS}
    errors = {tenant: shares[tenant] * weights / weight - 1 for tenant, weight in WEIGHTS.items()}
    return {
        "tokens": tokens,
        "shares": shares,
        "relative_errors": errors,
        "targets": {
            "largest relative error of a tenant's share": at_most(max(abs(e) for e in errors.values()), 0.05),
        },
    }


async def _measure(bench: TenantsBench, site: Site, reference: Reference, server: TenantServer) -> dict[str, int]:
    texts = Texts(1, len(reference.texts))
    async with tenants(WEIGHTS, server.target, site, reference) as callers:
        for caller in callers.values():  # their adapters are in memory before any of them is ahead
            await caller.ask([0])
        start = time.perf_counter() + bench.scale.lead_s
        end = start + bench.scale.shares_s
        count = bench.scale.in_flight // _LIST_TEXTS
        found = await asyncio.gather(*(closed_loop(t, count, end, texts, _LIST_TEXTS) for t in callers.values()))
    return {tenant: _tokens(outcomes, start, end) for tenant, outcomes in zip(callers, found, strict=True)}


def _tokens(outcomes: list[Outcome], start: float, end: float) -> int:
    return sum(outcome.num_tokens for outcome in outcomes if outcome.code == OK and start <= outcome.ended < end)
