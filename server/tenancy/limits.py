"""Limits of each tenant: requests per second, tokens per minute, concurrent requests, queued sequences.

A rate is a bucket that starts full: of a second's requests (at least one), or of a minute's tokens. Tokens are those
of the texts, charged before the request runs, and those that are generated, charged as they come: a request that runs
is never stopped by that, the tenant's next one waits.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from lora_runtime.errors import CapacityExceeded
from server.admission import MeanHold
from server.early_refusal import DeadlineUnreachable
from server.retry import retry_after_s
from server.tenancy.bucket import Clock, TokenBucket
from server.tenancy.model import Limits, Policy
from server.tenancy.quota import Quota, QuotaExceeded

_BYTES_PER_TOKEN = 4
_MAX_RETRY_S = 3600.0
_MAX_ACCOUNTS = 10_000  # beyond it the least recently used are forgotten even with a bucket that is not full


def estimate_tokens(num_bytes: int) -> int:
    """The tokens of one text before it is tokenised: a quarter of its UTF-8 bytes, rounded up, at least 1.

    About right for English, too few for most other languages; `TenantPermit.settle_tokens` corrects it afterwards.
    """
    return max(1, -(-num_bytes // _BYTES_PER_TOKEN))


@dataclass(slots=True)
class _Account:
    """What one tenant has left and holds."""

    tenant: str
    clock: Clock
    mean_hold: MeanHold  # of all tenants: one that was forgotten gets a fair hint at once
    limits: Limits = field(default_factory=Limits)
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    num_requests: int = 0
    num_sequences: int = 0

    def apply(self, limits: Limits) -> None:
        if limits == self.limits:
            return
        per_second, per_minute = limits.requests_per_second, limits.tokens_per_minute
        self.requests = self._bucket(self.requests, per_second, burst_s=1.0, min_burst=1.0)
        self.tokens = self._bucket(self.tokens, None if per_minute is None else per_minute / 60, burst_s=60.0)
        self.limits = limits

    def _bucket(
        self, bucket: TokenBucket | None, rate_per_s: float | None, *, burst_s: float, min_burst: float = 0.0
    ) -> TokenBucket | None:
        if rate_per_s is None:
            return None
        burst = max(rate_per_s * burst_s, min_burst)
        if bucket is None:
            return TokenBucket(rate_per_s, burst, self.clock)
        bucket.retune(rate_per_s, burst)
        return bucket

    def check(self, num_sequences: int, num_tokens: int) -> None:
        """Raise QuotaExceeded for the first limit that one more request would break; changes nothing."""
        limits = self.limits
        self._check_rate(Quota.REQUESTS_PER_SECOND, limits.requests_per_second, self.requests, 1)
        self._check_rate(Quota.TOKENS_PER_MINUTE, limits.tokens_per_minute, self.tokens, num_tokens)
        self._check_count(Quota.MAX_CONCURRENT_REQUESTS, limits.max_concurrent_requests, self.num_requests, 1)
        self.check_sequences(num_sequences)

    def check_sequences(self, num_more: int, num_own: int = 0) -> None:
        limit = self.limits.max_queued_sequences
        self._check_count(Quota.MAX_QUEUED_SEQUENCES, limit, self.num_sequences, num_more, num_own)

    def _check_rate(self, quota: Quota, limit: float | None, bucket: TokenBucket | None, amount: float) -> None:
        wait_s = 0.0 if bucket is None else bucket.wait_s(amount)
        if wait_s > 0.0:
            assert limit is not None, "a bucket without a limit"
            raise QuotaExceeded(self.tenant, quota, limit, None if math.isinf(wait_s) else min(wait_s, _MAX_RETRY_S))

    def _check_count(self, quota: Quota, limit: int | None, num_held: int, num_more: int, num_own: int = 0) -> None:
        if limit is None or num_held + num_more <= limit:
            return
        never = num_own + num_more > limit
        wait_s = None if never else retry_after_s(num_held + num_more - limit, num_held, self.mean_hold.seconds)
        raise QuotaExceeded(self.tenant, quota, limit, wait_s)

    @property
    def is_as_new(self) -> bool:
        """Whether forgetting it would change nothing."""
        buckets = (bucket for bucket in (self.requests, self.tokens) if bucket is not None)
        return self.num_requests == 0 and all(bucket.balance >= bucket.burst for bucket in buckets)


class TenantPermit:
    """What one request holds and has been charged. A context manager: released once, however it ends.

    When the block ends with a refusal (CapacityExceeded, DeadlineUnreachable, QuotaExceeded), the charge is given back.
    """

    def __init__(self, owner: TenantLimits, account: _Account, num_sequences: int, num_tokens: int) -> None:
        self._owner = owner
        self._account = account
        # the buckets that are charged: a new policy may take them from the account
        self._requests, self._tokens = account.requests, account.tokens
        self._started = account.clock()
        self._released = False
        self.num_sequences = num_sequences
        self.num_tokens = num_tokens
        account.num_requests += 1
        account.num_sequences += num_sequences
        _settle(self._requests, 1)
        _settle(self._tokens, num_tokens)

    def settle_tokens(self, actual: int) -> None:
        """Charge `actual` tokens in place of the estimate; may leave the tenant in debt."""
        assert not self._released, "a permit is settled before it is released"
        _settle(self._tokens, actual - self.num_tokens)
        self.num_tokens = actual

    def add_generated(self, num_tokens: int) -> None:
        """Charge tokens as they are generated; may leave the tenant in debt, and no refund gives them back."""
        assert not self._released, "nothing is generated for a released permit"
        _settle(self._tokens, num_tokens)

    def grow_to(self, num_sequences: int) -> None:
        """Hold `num_sequences` in all; raises QuotaExceeded, holding what it held. Never shrinks."""
        assert not self._released, "a released permit does not grow"
        num_more = num_sequences - self.num_sequences
        if num_more > 0:
            self._owner.check_growth(self._account, num_more, self.num_sequences)
            self._account.num_sequences += num_more
            self.num_sequences = num_sequences

    def refund(self) -> None:
        """Give the charge back: the request was refused after all. Before the release; a second call does nothing."""
        self.settle_tokens(0)
        _settle(self._requests, -1)
        self._requests = None

    def release(self) -> None:
        """Hold nothing any more; the charge stays. A second call does nothing."""
        if self._released:
            return
        self._released = True
        self._account.num_requests -= 1
        self._account.num_sequences -= self.num_sequences
        self._account.mean_hold.add(self._account.clock() - self._started)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, CapacityExceeded | DeadlineUnreachable | QuotaExceeded) and not self._released:
            self.refund()
        self.release()


def _settle(bucket: TokenBucket | None, amount: float) -> None:
    if bucket is not None:
        bucket.settle(amount)


class TenantLimits:
    """The limits of all tenants. Belongs to the asyncio loop: not thread-safe, and nothing waits.

    The policy is asked at every call, so that a new one needs no restart. `on_refusal` is told of every refusal.
    """

    def __init__(
        self,
        policy: Callable[[], Policy],
        clock: Clock = time.monotonic,
        on_refusal: Callable[[QuotaExceeded], None] | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._on_refusal = on_refusal
        self._mean_hold = MeanHold()
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """Tenants that are remembered."""
        return len(self._accounts)

    def admit(self, tenant: str, num_sequences: int, estimated_tokens: int) -> TenantPermit:
        """Charge and hold what a request needs; raises QuotaExceeded, and then charges nothing."""
        account = self._account(tenant)
        self._checked(lambda: account.check(num_sequences, estimated_tokens))
        return TenantPermit(self, account, num_sequences, estimated_tokens)

    def check_growth(self, account: _Account, num_more: int, num_own: int) -> None:
        """Whether a request that holds `num_own` sequences may hold `num_more`, by the policy of now."""
        account.apply(self._policy().limits_of(account.tenant))
        self._checked(lambda: account.check_sequences(num_more, num_own))

    def _checked(self, check: Callable[[], None]) -> None:
        try:
            check()
        except QuotaExceeded as error:
            if self._on_refusal is not None:
                self._on_refusal(error)
            raise

    def _account(self, tenant: str) -> _Account:
        self._forget_idle()
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(tenant, self._clock, self._mean_hold)
        self._accounts.move_to_end(tenant)
        account.apply(self._policy().limits_of(tenant))
        return account

    def _forget_idle(self) -> None:
        """Forget up to two tenants: more than a call adds, and no call pays for many."""
        for _ in range(min(2, len(self._accounts))):
            tenant, account = next(iter(self._accounts.items()))
            if account.num_requests > 0:
                self._accounts.move_to_end(tenant)
            elif account.is_as_new or len(self._accounts) >= _MAX_ACCOUNTS:
                del self._accounts[tenant]
            else:
                break
