"""Permits: bounded, refused at once, given back exactly once."""

from __future__ import annotations

import time
from collections import deque
from contextlib import AbstractContextManager

import pytest

from lora_runtime.errors import CapacityExceeded
from server.admission import Admission, Permits
from server.early_refusal import DeadlineUnreachable, EarlyRefusal


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Served:
    """A server that answers one sequence in `seconds_each`, under a clock that tests move."""

    def __init__(self, *, refuse_early: bool = True, seconds_each: float = 0.1) -> None:
        self.clock = Clock()
        early = EarlyRefusal(lambda tenant: 3.0 if tenant == "heavy" else 1.0, self.clock) if refuse_early else None
        self.admission = Admission(1000, early=early, clock=self.clock)
        self.seconds_each = seconds_each
        self.inside: deque[AbstractContextManager[Permits]] = deque()

    def admit(self, number: int = 1, remaining_s: float | None = None, tenant: str = "one", size: int = 1) -> None:
        for _ in range(number):
            permits = self.admission.permits(size, remaining_s, tenant)
            permits.__enter__()
            self.inside.append(permits)

    def answer(self, number: int) -> None:
        for _ in range(number):
            self.clock.now += self.seconds_each
            self.inside.popleft().__exit__(None, None, None)

    def fail(self, number: int) -> None:
        for _ in range(number):
            error = KeyError()
            self.inside.popleft().__exit__(KeyError, error, None)

    def refused(self, remaining_s: float, tenant: str = "one", size: int = 1) -> DeadlineUnreachable:
        with pytest.raises(DeadlineUnreachable) as caught:
            self.admit(1, remaining_s, tenant, size)
        return caught.value


def test_permits_are_counted_in_sequences() -> None:
    admission = Admission(10)
    with admission.permits(6), admission.permits(4):
        assert admission.num_sequences == 10
        with pytest.raises(CapacityExceeded), admission.permits(1):
            pass
        assert admission.num_sequences == 10
    assert admission.num_sequences == 0


def test_a_failure_inside_gives_the_permits_back() -> None:
    admission = Admission(10)
    with pytest.raises(KeyError), admission.permits(10):
        raise KeyError
    with admission.permits(10):
        assert admission.num_sequences == 10


def test_a_request_may_turn_out_to_need_more() -> None:
    admission = Admission(10)
    with admission.permits(2) as permits:
        permits.grow_to(7)
        assert admission.num_sequences == 7
        permits.grow_to(7)
        permits.grow_to(3)
        assert admission.num_sequences == 7, "permits that are held stay until the end"
        permits.grow_to(10)
        assert admission.num_sequences == 10
    assert admission.num_sequences == 0


def test_a_request_that_may_not_grow_keeps_what_it_held_until_its_end() -> None:
    admission = Admission(10)
    with admission.permits(6):
        with pytest.raises(CapacityExceeded, match="3 more do not fit"), admission.permits(2) as permits:
            permits.grow_to(5)
        assert admission.num_sequences == 6
        with admission.permits(2) as permits:
            with pytest.raises(CapacityExceeded):
                permits.grow_to(5)
            assert admission.num_sequences == 8
            permits.grow_to(4)
        assert admission.num_sequences == 6
    assert admission.num_sequences == 0


def test_the_retry_hint_is_bounded_and_grows_with_what_is_missing() -> None:
    clock = Clock()
    admission = Admission(10, clock=clock)
    for _ in range(200):
        with admission.permits(1):
            clock.now += 1
    with admission.permits(10):
        hints: list[float] = []
        for num_sequences in (1, 5, 1_000_000):
            with pytest.raises(CapacityExceeded) as caught, admission.permits(num_sequences):
                pass
            hints.append(caught.value.retry_after_s)
    assert hints == pytest.approx([0.1, 0.5, 5.0])


# Early refusal


def test_a_deadline_before_the_estimated_wait_is_refused_at_once() -> None:
    served = Served()
    served.admit(40)
    served.answer(20)
    before = served.admission.num_sequences
    error = served.refused(remaining_s=1.5)
    assert served.admission.num_sequences == before == 20
    assert error.retry_after_s == pytest.approx(21 / 10 * 1.25 - 1.5, rel=0.1), "20 wait, at 10 a second"
    assert error.reason == "DEADLINE_UNREACHABLE"
    assert "the deadline is in 1.5 s" in error.message
    served.admit(1, remaining_s=2.8)
    served.admit(1, remaining_s=None)


def test_a_request_that_is_long_itself_is_refused_with_less_before_it() -> None:
    served = Served()
    served.admit(40)
    served.answer(30)
    served.admit(1, remaining_s=1.5)
    served.refused(remaining_s=1.5, size=8)


def test_a_tenant_with_little_inside_does_not_wait_for_one_with_much() -> None:
    """The scheduler serves by weight: of three that wait, each has a third of the pace."""
    served = Served()
    served.admit(100, tenant="noisy")
    served.admit(1, tenant="quiet")
    served.answer(40)
    served.refused(remaining_s=1.0, tenant="noisy")
    served.admit(1, remaining_s=1.0, tenant="third")  # one of its own, and as much of the other two
    served.refused(remaining_s=0.3, tenant="third")
    served.admit(5, remaining_s=3.2, tenant="third")
    served.refused(remaining_s=2.0, tenant="third")


def test_a_tenant_of_more_weight_waits_less() -> None:
    served = Served()
    served.admit(100, tenant="noisy")
    served.answer(40)
    served.admit(9, remaining_s=1.7, tenant="heavy")
    served.refused(remaining_s=1.5, tenant="heavy")
    served.refused(remaining_s=1.5, tenant="third", size=9)


def test_early_refusal_is_off_unless_configured() -> None:
    served = Served(refuse_early=False)
    served.admit(40)
    served.answer(20)
    served.admit(1, remaining_s=0.001)


def test_nothing_is_refused_early_on_fewer_than_twenty_completions() -> None:
    served = Served()
    served.admit(60)
    served.answer(19)
    served.admit(1, remaining_s=0.001)
    served.answer(1)
    served.refused(remaining_s=0.001)


def test_an_idle_server_refuses_nobody() -> None:
    served = Served(seconds_each=0.9)
    served.admit(40)
    served.answer(40)
    served.admit(1, remaining_s=0.001)


def test_a_full_server_is_full_whatever_the_deadline() -> None:
    served = Served()
    served.admit(1000)
    with pytest.raises(CapacityExceeded):
        served.admit(1, remaining_s=1000)


def test_idle_time_does_not_count_as_slowness() -> None:
    served = Served(seconds_each=0.01)
    for _ in range(40):
        served.admit(1)
        served.answer(1)
        served.clock.now += 1
    served.admit(2)
    served.admit(1, remaining_s=0.1)


def test_a_pace_under_little_load_says_nothing_of_a_burst() -> None:
    """One at a time, 100 a second; a batch of 64 may well take no longer than one."""
    served = Served(seconds_each=0.01)
    for _ in range(200):
        served.admit(1)
        served.answer(1)
    served.admit(64)
    served.admit(1, remaining_s=0.1)


def test_sequences_that_are_answered_in_batches_are_all_counted() -> None:
    served = Served(seconds_each=0.0)
    for _ in range(10):
        served.admit(128 - len(served.inside))
        served.clock.now += 0.5
        served.answer(64)
    wait_s = 64 * 0.5 / 64  # one batch is inside
    served.admit(1, remaining_s=1.5 * wait_s)
    served.refused(remaining_s=0.7 * wait_s)


def test_a_cold_adapter_that_everybody_waits_for_is_not_the_pace() -> None:
    served = Served(seconds_each=0.01)
    served.admit(60)
    served.answer(50)
    served.clock.now += 30  # the rest wait for its download
    served.admit(1, remaining_s=0.5)
    served.answer(1)
    served.admit(1, remaining_s=0.5)


def test_requests_that_fail_do_not_count_as_answered() -> None:
    """Those whose deadline passed leave fast; that must not make room for more of them."""
    served = Served()
    served.admit(100)
    for _ in range(20):
        served.answer(1)
        served.fail(3)
        served.admit(4)
    assert served.refused(remaining_s=5).retry_after_s == pytest.approx(5, rel=0.1)


def test_a_pace_of_long_ago_is_forgotten() -> None:
    served = Served()
    served.admit(60)
    served.answer(30)
    served.refused(remaining_s=0.1)
    served.clock.now += 61
    served.admit(1, remaining_s=0.1)


def test_refusals_cost_the_loop_less_than_a_millisecond() -> None:
    served = Served()
    served.admit(200)
    for n in range(500):
        served.admit(tenant=f"t{n}")
    served.answer(100)
    costs: list[float] = []
    for _ in range(200):
        started = time.perf_counter()
        served.refused(remaining_s=0.1)
        costs.append(time.perf_counter() - started)
    assert sorted(costs)[len(costs) // 2] < 1e-3
