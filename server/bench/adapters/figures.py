"""Figures with their targets, as plain data for the result file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from server.bench.measure import Spread


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and the raw values."""
    return asdict(Spread.of(values)) | {"raw": values}


def percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def at_most(value: float, limit: float) -> dict[str, Any]:
    """A figure that should not be larger."""
    return {"value": value, "at_most": limit, "met": bool(value <= limit)}


def at_least(value: float, limit: float) -> dict[str, Any]:
    """A figure that should not be smaller."""
    return {"value": value, "at_least": limit, "met": bool(value >= limit)}
