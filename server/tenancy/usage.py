"""Who used how much: counts per tenant and adapter version, since the server started."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_runtime.errors import MultiloraError
from lora_runtime.generation import Generated
from lora_runtime.observers import EngineObserver
from lora_runtime.types import AdapterId, BatchStats, Request, Result

_MAX_ENTRIES = 10_000
OTHER_TENANTS = ""  # no tenant's name; those beyond the bound are counted under it
_MAX_PENDING = 4096  # more than a batch answers


@dataclass(slots=True)
class UsageCounts:
    """Sequences, tokens and seconds are those of answered requests."""

    requests_ok: int = 0
    requests_failed: int = 0
    sequences: int = 0
    input_tokens: int = 0
    output_tokens: int = 0  # that were generated
    queue_s: float = 0.0
    load_wait_s: float = 0.0
    forward_s: float = 0.0  # this usage's share of its batches' seconds, by tokens

    def copy(self) -> UsageCounts:  # several times faster than dataclasses.replace
        requests = (self.requests_ok, self.requests_failed)
        amounts = (self.sequences, self.input_tokens, self.output_tokens)
        return UsageCounts(*requests, *amounts, self.queue_s, self.load_wait_s, self.forward_s)

    def add_answer(self, num_sequences: int, num_tokens: int, num_generated: int, result: Result) -> None:
        self.requests_ok += 1
        self.sequences += num_sequences
        self.input_tokens += num_tokens
        self.output_tokens += num_generated
        self.queue_s += result.timings.queue_s
        self.load_wait_s += result.timings.load_wait_s


@dataclass(frozen=True, slots=True)
class UsageEntry:
    """What one tenant used of one adapter version, a deleted one included."""

    tenant: str  # who asked; OTHER_TENANTS for those beyond the bound
    adapter: AdapterId | None  # None: all adapters beyond the bound
    since_unix_s: float  # when counting began
    counts: UsageCounts  # a copy


class TenantTotals(NamedTuple):  # made for every active tenant at every scrape
    """Over all adapters of one tenant."""

    requests_ok: int
    requests_failed: int
    tokens: int


@dataclass(slots=True)
class _Tenant:
    adapters: dict[AdapterId | None, UsageCounts] = field(default_factory=dict[AdapterId | None, UsageCounts])
    requests_ok: int = 0
    requests_failed: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Answered:
    """An answer whose batch is not reported yet."""

    counts: UsageCounts
    num_tokens: int
    forward_s: float


def _payer(request: Request) -> str:
    return request.tenant or request.adapter.tenant


def num_generated_tokens(result: Result) -> int:
    """Over all sequences and samples of a generating request."""
    generated = (output for output in result.outputs if isinstance(output, Generated))
    return sum(len(sample.tokens) for output in generated for sample in output.samples)


class UsageMeter(EngineObserver):
    """Counts in the engine's thread, is read from any other; the lock is held for one tenant at a time.

    `tenant_of` says who pays for a request: who asks, which is not the adapter's owner where that shares it.
    """

    def __init__(
        self,
        tenant_of: Callable[[Request], str] = _payer,
        *,
        max_entries: int = _MAX_ENTRIES,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.since_unix_s = wall_clock()
        self._tenant_of = tenant_of
        self._max_entries = max_entries  # tenants, and adapters of all of them together
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant] = {}
        self._active: dict[str, _Tenant] = {}  # since `take_active` was called last
        self._num_adapters = 0
        self._answered: list[_Answered] = []

    def on_result(self, request: Request, result: Result | MultiloraError) -> None:
        num_tokens = sum(sequence.num_tokens for sequence in request.sequences)
        with self._lock:
            tenant = self._tenant(self._tenant_of(request))
            counts = self._counts(tenant, request.adapter)
            if isinstance(result, MultiloraError):
                counts.requests_failed += 1
                tenant.requests_failed += 1
                return
            num_generated = 0 if request.generation is None else num_generated_tokens(result)
            counts.add_answer(len(request.sequences), num_tokens, num_generated, result)
            tenant.requests_ok += 1
            tenant.tokens += num_tokens
        self._answered.append(_Answered(counts, num_tokens + num_generated, result.timings.forward_s))
        if len(self._answered) >= _MAX_PENDING:  # no batch is reported: each is charged all the time it took
            self._charge(float("inf"))

    def on_batch(self, stats: BatchStats) -> None:
        """The engine reports a batch after the requests that it completed.

        A request that took several batches is charged for all its tokens at the pace of the last one, and never more
        than the time from its first batch to its last.
        """
        self._charge(stats.forward_s / max(stats.num_tokens, 1))

    def snapshot(self, tenant: str | None) -> list[UsageEntry]:
        """Entries of one tenant, or of all: by tenant, then adapter, what is summed beyond the bound last.

        All of them may be 20,000, tens of milliseconds: ask for those in a thread, not in the loop.
        """
        with self._lock:
            names = sorted(self._tenants) if tenant is None else [name for name in (tenant,) if name in self._tenants]
        return [entry for name in names for entry in self._entries(name)]

    def take_active(self) -> dict[str, TenantTotals]:
        """Totals of those that asked since the last call, OTHER_TENANTS included; at most `max_entries` and one.

        For one reader: with thousands of tenants that are idle, what is new is far less than what there is.
        """
        with self._lock:
            active, self._active = self._active, {}
        totals: dict[str, TenantTotals] = {}
        for name, tenant in active.items():
            with self._lock:
                totals[name] = TenantTotals(tenant.requests_ok, tenant.requests_failed, tenant.tokens)
        return totals

    def _entries(self, name: str) -> list[UsageEntry]:
        with self._lock:
            copies = [(adapter, counts.copy()) for adapter, counts in self._tenants[name].adapters.items()]
        if len(copies) > 1:
            copies.sort(
                key=lambda copy: (1,) if copy[0] is None else (0, copy[0].tenant, copy[0].name, copy[0].version)
            )
        return [UsageEntry(name, adapter, self.since_unix_s, counts) for adapter, counts in copies]

    def _tenant(self, name: str) -> _Tenant:
        if name not in self._tenants and len(self._tenants) >= self._max_entries:
            name = OTHER_TENANTS
        tenant = self._active[name] = self._tenants.setdefault(name, _Tenant())
        return tenant

    def _counts(self, tenant: _Tenant, adapter: AdapterId) -> UsageCounts:
        if adapter in tenant.adapters:
            return tenant.adapters[adapter]
        if self._num_adapters >= self._max_entries or tenant is self._tenants.get(OTHER_TENANTS):
            return tenant.adapters.setdefault(None, UsageCounts())
        self._num_adapters += 1
        return tenant.adapters.setdefault(adapter, UsageCounts())

    def _charge(self, seconds_per_token: float) -> None:
        with self._lock:
            for answered in self._answered:
                seconds = min(answered.forward_s, answered.num_tokens * seconds_per_token)
                answered.counts.forward_s += seconds
        self._answered.clear()
