from __future__ import annotations

import math

import pytest

from lora_runtime.answers.vectors import unit_length


def test_a_vector_keeps_its_direction_and_gets_length_one() -> None:
    assert unit_length([3.0, -4.0]) == pytest.approx((0.6, -0.8))
    assert math.hypot(*unit_length([0.1 * k for k in range(384)])) == pytest.approx(1.0)


def test_a_zero_vector_stays_zero() -> None:
    assert unit_length([0.0, -0.0]) == (0.0, 0.0)
    assert unit_length([]) == ()


@pytest.mark.parametrize("scale", [1e-200, 1e300])
def test_values_whose_squares_leave_the_range_of_floats_are_no_trouble(scale: float) -> None:
    assert unit_length([3 * scale, 4 * scale]) == pytest.approx((0.6, 0.8))
