"""Embeddings as callers compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def unit_length(values: Sequence[float]) -> tuple[float, ...]:
    """`values / sqrt(sum(values**2))`, so that a dot product is a cosine; a vector of zeros stays one."""
    length = math.hypot(*values)  # neither overflows nor underflows where the squares would
    return tuple(value / length for value in values) if length else tuple(values)
