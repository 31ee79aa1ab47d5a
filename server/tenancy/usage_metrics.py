"""Prometheus counters per tenant, with a bound on their number.

The 50 busiest tenants have series of their own and keep them once shown, up to 200 in the life of the process; all
others count as `other`. What was once counted as `other` stays there, so no counter ever goes down.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client.registry import Collector

from server.metrics.collect import Family, family
from server.tenancy.usage import OTHER_TENANTS, TenantTotals, UsageMeter

OTHER = "other"  # a tenant of this name has no series of its own
_NOTHING = TenantTotals(0, 0, 0)
_NUM_BUSIEST = 50
_MAX_SHOWN = 200
_MAX_TENANTS = 10_000  # whose activity is remembered
_MAX_REJECTED = 10_000  # pairs of tenant and quota between two scrapes

REQUESTS = "multilora_tenant_requests_total"
TOKENS = "multilora_tenant_tokens_total"
REJECTIONS = "multilora_tenant_rejections_total"

NAMES = (REQUESTS, TOKENS, REJECTIONS)

_Key = tuple[str, tuple[str, ...]]  # a name in NAMES, and the labels' values, the tenant first


class UsageMetrics(Collector):
    """`usage_metrics`: to be registered once. Reads the meter at each scrape; adds what is new since the last one."""

    def __init__(self, meter: UsageMeter) -> None:
        self._meter = meter
        self._lock = threading.Lock()  # of everything below; scrapes may overlap
        self._rejections: Tally[tuple[str, str]] = Tally()  # since the last scrape, by tenant and quota
        self._activity: Tally[str] = Tally()  # requests by tenant, refused ones included
        self._counted: dict[str, TenantTotals] = {}  # of the meter, at the last scrape
        self._series: Tally[_Key] = Tally()  # as exposed
        self._shown: set[str] = set()

    def count_rejection(self, tenant: str, quota: str) -> None:
        """Count one refusal; from any thread, quick."""
        with self._lock:
            full = len(self._rejections) >= _MAX_REJECTED
            key = (OTHER, quota) if full and (tenant, quota) not in self._rejections else (tenant, quota)
            self._rejections[key] += 1

    def describe(self) -> Iterator[Family]:
        """Names only: registering reads nothing."""
        return iter(self._families().values())

    def collect(self) -> Iterator[Family]:
        families = self._families()
        with self._lock:
            news = self._news()
            if news and len(self._shown) < _MAX_SHOWN:
                self._show_busiest()
            for (name, (tenant, *labels)), amount in news.items():
                label = tenant if tenant in self._shown else OTHER
                if amount:
                    self._series[name, (label, *labels)] += amount
            for (name, labels), value in sorted(self._series.items()):
                families[name].add_metric(labels, value)
        return iter(families.values())

    def _news(self) -> Tally[_Key]:
        """What happened since the last scrape, by tenant."""
        news: Tally[_Key] = Tally()
        totals = self._meter.take_active()
        for tenant, now in totals.items():
            before = self._counted.get(tenant, _NOTHING)
            if now != before:
                news[REQUESTS, (tenant, "ok")] = now.requests_ok - before.requests_ok
                news[REQUESTS, (tenant, "error")] = now.requests_failed - before.requests_failed
                news[TOKENS, (tenant,)] = now.tokens - before.tokens
        self._counted |= totals
        for (tenant, quota), number in self._rejections.items():
            news[REJECTIONS, (tenant, quota)] = number
        self._rejections.clear()
        for (name, (tenant, *_)), number in news.items():
            known = tenant in self._activity or len(self._activity) < _MAX_TENANTS
            if name != TOKENS and known:
                self._activity[tenant] += number
        return news

    def _show_busiest(self) -> None:
        known = (tenant for tenant in self._activity if tenant not in (OTHER, OTHER_TENANTS))
        for tenant in heapq.nlargest(_NUM_BUSIEST, known, key=self._activity.__getitem__):
            if len(self._shown) < _MAX_SHOWN:
                self._shown.add(tenant)

    @staticmethod
    def _families() -> dict[str, Family]:
        return {name: family(name) for name in NAMES}
