"""Limits per tenant: rates that hold over any window, refusals that cost nothing, permits given back once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.errors import CapacityExceeded
from server.early_refusal import DeadlineUnreachable
from server.tenancy.bucket import TokenBucket
from server.tenancy.limits import TenantLimits, TenantPermit, estimate_tokens
from server.tenancy.model import Limits, Policy
from server.tenancy.quota import Quota, QuotaExceeded

STEPS = st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 30)), max_size=60)  # seconds passed, amount asked


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """Limits under a clock and a policy that tests move."""

    def __init__(self, limits: Limits) -> None:
        self.clock = Clock()
        self.policy = Policy(default_limits=limits)
        self.refusals: list[QuotaExceeded] = []
        self.limits = TenantLimits(lambda: self.policy, self.clock, self.refusals.append)

    def admit(self, sequences: int = 1, tokens: int = 0, tenant: str = "acme") -> TenantPermit:
        return self.limits.admit(tenant, sequences, tokens)

    def refused(self, sequences: int = 1, tokens: int = 0, tenant: str = "acme") -> QuotaExceeded:
        with pytest.raises(QuotaExceeded) as caught:
            self.admit(sequences, tokens, tenant)
        assert self.refusals[-1] is caught.value
        return caught.value

    def use(self, limits: Limits) -> None:
        self.policy = Policy(default_limits=limits)

    def admitted(self, tokens: int = 0) -> int:
        """How many requests in a row are admitted now."""
        for number in range(1000):
            try:
                self.admit(tokens=tokens).release()
            except QuotaExceeded:
                return number
        raise AssertionError("there is no limit")


# The bucket


@given(st.floats(0.1, 50), st.floats(1, 20), STEPS)
def test_no_window_gives_more_than_its_rate_and_a_burst(
    rate: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    taken: list[tuple[float, float]] = []
    for passed, amount in steps:
        clock.now += passed
        if bucket.take(amount) == 0.0:
            taken.append((clock.now, amount))
    for first, (start, _) in enumerate(taken):
        total, largest = 0.0, 0.0
        for end, amount in taken[first:]:
            total += amount
            largest = max(largest, amount)
            # what is larger than the burst goes into debt, once the bucket is full
            assert total <= (rate * (end - start) + max(burst, largest)) * (1 + 1e-6)


@given(st.floats(0.1, 50), st.floats(1, 20), STEPS)
def test_whoever_waits_as_long_as_told_is_served(rate: float, burst: float, steps: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    for passed, amount in steps:
        clock.now += passed
        before = bucket.balance
        if wait_s := bucket.take(amount):
            assert bucket.balance == before, "a refusal takes nothing"
            clock.now += wait_s
            assert bucket.take(amount) == 0.0


@given(st.lists(st.tuples(st.sampled_from(["take", "give_back", "settle"]), st.floats(0, 100)), max_size=40))
def test_a_bucket_is_never_fuller_than_full(calls: list[tuple[str, float]]) -> None:
    clock = Clock()
    bucket = TokenBucket(3, 10, clock)
    for method, amount in calls:
        bucket.take(amount) if method == "take" else bucket.settle(-amount if method == "give_back" else amount)
        clock.now += 0.1
        assert bucket.balance <= 10


def test_what_is_larger_than_the_burst_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 10, clock)
    assert bucket.take(35) == 0.0
    assert bucket.balance == -25
    assert bucket.take(1) == pytest.approx(2.6)
    clock.now += 2.6
    assert bucket.take(1) == 0.0
    assert bucket.take(35) == pytest.approx(1.0), "full again, not 35"


def test_a_rate_of_nothing_admits_nothing() -> None:
    assert TokenBucket(0, 1).take(1) == math.inf


@given(st.floats(1, 100), st.floats(1, 100), st.floats(0, 1))
def test_a_new_rate_keeps_the_share_of_the_balance(before: float, after: float, share: float) -> None:
    bucket = TokenBucket(before, before, Clock())
    bucket.settle(before * share)
    bucket.retune(after, after)
    assert bucket.balance == pytest.approx(after * (1 - share), abs=1e-9)


# Each limit


def test_requests_per_second() -> None:
    server = Server(Limits(requests_per_second=5))
    assert server.admitted() == 5
    error = server.refused()
    assert (error.quota, error.limit, error.subject) == (Quota.REQUESTS_PER_SECOND, 5, "acme")
    assert error.retry_after_s == pytest.approx(0.2)
    assert error.metadata == {"subject": "acme", "quota": "requests_per_second", "limit": "5"}
    assert "acme" in error.message and "try again in 0.2 s" in error.message
    server.clock.now += 0.4
    assert server.admitted() == 2


def test_less_than_one_request_per_second() -> None:
    server = Server(Limits(requests_per_second=0.1))
    assert server.admitted() == 1
    assert server.refused().retry_after_s == pytest.approx(10)


def test_tokens_per_minute() -> None:
    server = Server(Limits(tokens_per_minute=600))
    server.admit(tokens=590).release()
    error = server.refused(tokens=30)
    assert error.quota is Quota.TOKENS_PER_MINUTE
    assert error.retry_after_s == pytest.approx(2)
    server.clock.now += 2
    server.admit(tokens=30)


def test_a_request_of_more_than_a_minutes_tokens_is_admitted_by_a_full_bucket() -> None:
    server = Server(Limits(tokens_per_minute=60))
    server.admit(tokens=1).release()
    assert server.refused(tokens=200).retry_after_s == pytest.approx(1)
    server.clock.now += 1
    server.admit(tokens=200).release()
    assert server.refused(tokens=1).retry_after_s == pytest.approx(141)


def test_concurrent_requests() -> None:
    server = Server(Limits(max_concurrent_requests=2))
    first, _ = server.admit(), server.admit()
    error = server.refused()
    assert error.quota is Quota.MAX_CONCURRENT_REQUESTS
    assert error.retry_after_s is not None
    assert error.retry_after_s > 0
    first.release()
    server.admit()


def test_queued_sequences_and_their_growth() -> None:
    server = Server(Limits(max_queued_sequences=10))
    permit, other = server.admit(4), server.admit(4)
    assert server.refused(3).quota is Quota.MAX_QUEUED_SEQUENCES
    permit.grow_to(6)
    permit.grow_to(5)
    with pytest.raises(QuotaExceeded) as caught:
        other.grow_to(5)
    assert caught.value.retry_after_s is not None
    with pytest.raises(QuotaExceeded) as caught:
        other.grow_to(11)
    assert caught.value.retry_after_s is None, "more than the limit never fits"
    permit.release()
    server.admit(6)


@pytest.mark.parametrize(
    "limits", [Limits(requests_per_second=0), Limits(tokens_per_minute=0), Limits(max_concurrent_requests=0)]
)
def test_where_waiting_does_not_help_no_time_is_promised(limits: Limits) -> None:
    error = Server(limits).refused(tokens=1)
    assert error.retry_after_s is None
    assert "waiting does not help" in error.message


def test_the_hint_follows_how_long_requests_take() -> None:
    server = Server(Limits(max_concurrent_requests=1))
    for _ in range(100):
        with server.admit():
            server.clock.now += 2
    with server.admit():
        assert server.refused().retry_after_s == pytest.approx(2, rel=0.01)


def test_the_first_broken_limit_is_named() -> None:
    server = Server(
        Limits(requests_per_second=1, tokens_per_minute=60, max_concurrent_requests=1, max_queued_sequences=1)
    )
    server.admit(1, 60)
    assert server.refused(5, 5).quota is Quota.REQUESTS_PER_SECOND
    server.clock.now += 1
    assert server.refused(5, 5).quota is Quota.TOKENS_PER_MINUTE
    server.clock.now += 60
    assert server.refused(5, 5).quota is Quota.MAX_CONCURRENT_REQUESTS
    server.use(Limits(max_queued_sequences=1))
    assert server.refused(5, 5).quota is Quota.MAX_QUEUED_SEQUENCES


def test_tenants_do_not_share() -> None:
    server = Server(Limits(requests_per_second=1))
    server.admit(tenant="acme")
    server.admit(tenant="globex")
    server.refused(tenant="acme")


def test_without_limits_everything_is_admitted() -> None:
    server = Server(Limits())
    for _ in range(1000):
        server.admit(10**6, 10**9)


# Charges and permits


def test_the_estimate_is_a_quarter_of_the_bytes_and_at_least_one() -> None:
    assert [estimate_tokens(n) for n in (0, 1, 4, 5, 400)] == [1, 1, 1, 2, 100]


def test_the_charge_is_corrected_after_tokenising() -> None:
    server = Server(Limits(tokens_per_minute=60))
    permit = server.admit(tokens=10)
    permit.settle_tokens(90)
    assert server.refused(tokens=1).retry_after_s == pytest.approx(31)
    permit.settle_tokens(4)
    permit.release()
    server.admit(tokens=56)
    server.refused(tokens=1)


@given(
    st.integers(1, 10),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 80), st.integers(0, 40)), max_size=30),
)
def test_a_refusal_charges_nothing(limit: int, requests: list[tuple[int, int, int]]) -> None:
    """A server that is also sent requests that it refuses admits the others as if they had not come."""
    limits = Limits(requests_per_second=5, tokens_per_minute=120, max_concurrent_requests=3, max_queued_sequences=limit)
    server, quiet = Server(limits), Server(limits)
    held: list[tuple[TenantPermit, TenantPermit]] = []
    for sequences, tokens, tenths in requests:
        try:
            permit = server.admit(sequences, tokens)
        except QuotaExceeded:
            pass
        else:
            held.append((permit, quiet.admit(sequences, tokens)))
        if tenths % 3 == 0 and held:
            for each in held.pop(0):
                each.release()
        server.clock.now += tenths / 10
        quiet.clock.now = server.clock.now
    for probe in (lambda s: s.admitted(tokens=1), lambda s: s.admitted(tokens=30)):
        assert probe(server) == probe(quiet)


@pytest.mark.parametrize("error", [None, KeyError("bug"), CapacityExceeded("full"), DeadlineUnreachable(2, 1)])
@pytest.mark.parametrize("steps", [[], ["settle"], ["grow"], ["settle", "grow", "release"], ["release", "release"]])
def test_every_path_gives_back_what_is_held_exactly_once(error: Exception | None, steps: list[str]) -> None:
    server = Server(Limits(max_concurrent_requests=2, max_queued_sequences=10))
    with server.admit(5):  # of another request: given back twice, its share would be free
        try:
            with server.admit(2) as permit:
                for step in steps:
                    {"settle": lambda: permit.settle_tokens(3), "grow": lambda: permit.grow_to(5)}.get(
                        step, permit.release
                    )()
                if error is not None:
                    raise error
        except type(error or ValueError):
            pass
        permit.release()
        assert server.refused(6).quota is Quota.MAX_QUEUED_SEQUENCES
        with server.admit(5):
            assert server.refused(0).quota is Quota.MAX_CONCURRENT_REQUESTS


@pytest.mark.parametrize("refusal", [CapacityExceeded("full"), DeadlineUnreachable(2, 1)])
def test_a_request_that_the_server_refuses_later_is_not_charged(refusal: Exception) -> None:
    server = Server(Limits(requests_per_second=1, tokens_per_minute=60))
    permit = server.admit(1, 50)
    permit.settle_tokens(60)
    with pytest.raises(type(refusal)), permit:
        raise refusal
    server.admit(1, 60)


def test_a_request_that_may_not_grow_is_not_charged() -> None:
    server = Server(Limits(requests_per_second=1, tokens_per_minute=60, max_queued_sequences=3))
    with pytest.raises(QuotaExceeded), server.admit(1, 50) as permit:
        permit.grow_to(4)
    server.admit(3, 60)


def test_a_request_that_fails_is_charged() -> None:
    server = Server(Limits(requests_per_second=1))
    with pytest.raises(KeyError), server.admit():
        raise KeyError
    server.refused()


# Policies that change, tenants that go


def test_a_new_policy_applies_to_the_next_call() -> None:
    server = Server(Limits(requests_per_second=10, tokens_per_minute=600))
    for _ in range(5):
        server.admit(tokens=60).release()
    server.use(Limits(requests_per_second=100, tokens_per_minute=6000))
    assert server.admitted() == 50, "half of the bucket was left, half is left"
    server.use(Limits(requests_per_second=100))
    server.clock.now += 1
    assert server.admitted(tokens=10**9) == 100
    server.use(Limits(max_concurrent_requests=1))
    with server.admit():
        server.refused()


def test_requests_that_are_inside_count_under_a_new_policy() -> None:
    server = Server(Limits())
    with server.admit(8, 10) as permit:
        server.use(Limits(tokens_per_minute=60, max_queued_sequences=10))
        assert server.refused(3).quota is Quota.MAX_QUEUED_SEQUENCES
        with pytest.raises(QuotaExceeded):
            permit.grow_to(12)
        permit.grow_to(10)
        permit.settle_tokens(1000)  # was admitted without a bucket
    server.admit(10, 60)


def test_a_new_policy_applies_to_the_growth_of_a_request_that_is_inside() -> None:
    server = Server(Limits())
    with server.admit(8) as permit:
        server.use(Limits(max_queued_sequences=10))
        with pytest.raises(QuotaExceeded):
            permit.grow_to(12)
        permit.grow_to(10)


def test_a_hundred_thousand_tenants_are_not_kept() -> None:
    server = Server(Limits(requests_per_second=1, tokens_per_minute=60))
    for number in range(100_000):
        server.admit(tokens=60, tenant=f"t{number}").release()
    assert len(server.limits) <= 10_000
    server.refused(tenant="t99999")


def test_tenants_whose_buckets_are_full_again_are_forgotten_two_by_two() -> None:
    server = Server(Limits(requests_per_second=1))
    held = server.admit(tenant="held")
    for number in range(100):
        server.admit(tenant=f"t{number}").release()
    assert len(server.limits) == 101
    server.clock.now += 1
    for _ in range(100):
        server.admit(tenant="t99").release()
        server.clock.now += 1
    assert len(server.limits) == 2, "the one that asks and the one that is held"
    held.release()


# Generated tokens


def test_generated_tokens_are_charged_as_they_come_and_stop_nobody_who_runs() -> None:
    server = Server(Limits(tokens_per_minute=60))
    permit = server.admit(tokens=10)
    permit.add_generated(45)
    assert server.refused(tokens=6).quota is Quota.TOKENS_PER_MINUTE
    permit.add_generated(45)  # into debt
    permit.release()
    server.clock.now += 39.0
    server.refused(tokens=1)
    server.clock.now += 2.0
    server.admit(tokens=1).release()


def test_generated_tokens_are_never_given_back() -> None:
    server = Server(Limits(tokens_per_minute=60))
    permit = server.admit(tokens=10)
    permit.add_generated(40)
    permit.refund()
    permit.release()
    server.refused(tokens=21)
    server.admit(tokens=20)
