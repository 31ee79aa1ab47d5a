"""Calls that are cancelled, or whose deadline passes, at any moment; afterwards the server holds nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
from grpc import aio

from server.bench.adapters.figures import at_least, at_most, percentile
from server.bench.adapters.reference import Reference
from server.bench.measure import OutputsDiffer
from server.bench.tenants.asking import OK, Tenant, Texts, reason_of, tenants
from server.bench.tenants.plan import BOUNDED, BOUNDED_SEQUENCES, SETTLE_S, TenantsBench
from server.bench.tenants.servers import ADMITTED, TenantServer
from server.bench.tenants.site import Site
from server.bench.tenants.watched_app import HELD_REQUESTS, HELD_SEQUENCES, OPEN_TICKETS

_GAUGES = (ADMITTED, HELD_REQUESTS, HELD_SEQUENCES, OPEN_TICKETS)
_MAX_TEXTS = 12  # of one call
_EARLY = 0.25  # of the calls end before they could have reached the engine
_EARLY_S = 0.01
_GIVE_UP_S = 20.0


def measure_cancels(
    bench: TenantsBench, site: Site, reference: Reference, server: TenantServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds after the last call until gauges are 0; then every tenant gets as much as its limit allows."""
    return asyncio.run(_Cancelling(bench, site, reference).measure(server, progress))


class _Cancelling:
    """Workers that call and do not wait for long."""

    def __init__(self, bench: TenantsBench, site: Site, reference: Reference) -> None:
        self._scale = bench.scale
        self._site = site
        self._reference = reference
        self._texts = Texts(3, len(reference.texts))
        self._chance = random.Random(3)
        self._outcomes: Counter[str] = Counter()
        self._span_s = 0.0
        self._last = 0.0  # when the last call was cancelled or expired

    async def measure(self, server: TenantServer, progress: Callable[[str], None]) -> dict[str, Any]:
        async with tenants(BOUNDED, server.target, self._site, self._reference) as callers:
            self._span_s = await self._longest(list(callers.values()))
            busiest = {gauge: 0.0 for gauge in _GAUGES}
            workers = asyncio.gather(*(self._work(list(callers.values())) for _ in range(self._scale.cancel_workers)))
            while not workers.done():
                progress(f"{self._outcomes['cancelled']} cancelled, {self._outcomes['expired']} expired")
                held = await asyncio.to_thread(_held, server)
                busiest = {gauge: max(busiest[gauge], held[gauge]) for gauge in _GAUGES}
                await asyncio.sleep(0.1)
            await workers
            settled_s, held = await self._settled(server)
            whole = [min(range(len(self._reference.texts)), key=lambda text: len(self._reference.texts[text]))]
            full = [await caller.ask(BOUNDED_SEQUENCES * whole) for caller in callers.values()]
        if not all(busiest.values()):
            raise OutputsDiffer(f"nothing was ever held by {busiest}: there was nothing to leak")
        refused = sum(outcome.code != OK for outcome in full)
        return {
            "outcomes": dict(self._outcomes),
            "span_seconds": self._span_s,
            "most_held": busiest,
            "left": held,
            "targets": {
                "cancelled calls": at_least(self._outcomes["cancelled"], self._scale.cancels),
                "expired deadlines": at_least(self._outcomes["expired"], self._scale.cancels),
                "seconds after the last until nothing is held": at_most(settled_s, SETTLE_S),
                "admitted sequences, tenants' requests and sequences, engine's tickets left": at_most(
                    sum(held.values()), 0
                ),
                "calls of a tenant's whole limit refused afterwards": at_most(refused, 0),
            },
        }

    async def _longest(self, callers: list[Tenant]) -> float:
        """p90 of calls with as many in flight, none of them cancelled."""
        each = self._scale.cancel_workers // len(callers)
        asks = [caller.ask(self._some()) for caller in callers for _ in range(each)]
        await asyncio.gather(*(caller.ask([0]) for caller in callers))  # loads the adapters
        return percentile([outcome.seconds for outcome in await asyncio.gather(*asks)], 90)

    def _some(self) -> list[int]:
        return self._texts.some(self._chance.randint(1, _MAX_TEXTS))

    async def _work(self, callers: list[Tenant]) -> None:
        """Calls of both kinds, until there are enough of both."""
        while kinds := [kind for kind in ("cancelled", "expired") if self._outcomes[kind] < self._scale.cancels]:
            kind, caller = self._chance.choice(kinds), self._chance.choice(callers)
            early = self._chance.random() < _EARLY
            seconds = self._chance.uniform(0, _EARLY_S if early else 1.2 * self._span_s)
            self._outcomes[await (self._cancel if kind == "cancelled" else self._expire)(caller, seconds)] += 1

    async def _cancel(self, caller: Tenant, seconds: float) -> str:
        texts = self._some()
        call = caller.begin(texts)
        await asyncio.wait([asyncio.ensure_future(call.code())], timeout=seconds)
        if call.cancel():
            self._last = time.perf_counter()
            return "cancelled"
        return await self._end(caller, texts, call)

    async def _expire(self, caller: Tenant, seconds: float) -> str:
        texts = self._some()
        return await self._end(caller, texts, caller.begin(texts, seconds))

    async def _end(self, caller: Tenant, texts: list[int], call: aio.UnaryUnaryCall[Any, Any]) -> str:
        try:
            caller.check(texts, await call)
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                return reason_of(error)
            self._last = time.perf_counter()
            return "expired"
        return "answered"

    async def _settled(self, server: TenantServer) -> tuple[float, dict[str, float]]:
        """Seconds since the last one, and what is held then: nothing, unless something stays for good."""
        while True:
            held = await asyncio.to_thread(_held, server)
            seconds = time.perf_counter() - self._last
            if not any(held.values()) or seconds > _GIVE_UP_S:
                return seconds, held
            await asyncio.sleep(0.02)


def _held(server: TenantServer) -> dict[str, float]:
    return {gauge: server.sample(gauge) for gauge in _GAUGES}
