"""Permits: bounded, refused at once, given back exactly once."""

from __future__ import annotations

import pytest

from lora_runtime.errors import CapacityExceeded
from server.admission import Admission


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
    admission = Admission(10)
    for _ in range(50):
        with admission.permits(1):
            pass
    admission._mean_hold_s = 1.0  # pyright: ignore[reportPrivateUsage] - a second, without waiting for it
    with admission.permits(10):
        hints: list[float] = []
        for num_sequences in (1, 5, 1_000_000):
            with pytest.raises(CapacityExceeded) as caught, admission.permits(num_sequences):
                pass
            hints.append(caught.value.retry_after_s)
    assert hints == pytest.approx([0.1, 0.5, 5.0])
