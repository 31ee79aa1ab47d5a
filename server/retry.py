"""When to try again."""

from __future__ import annotations

_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 5.0


def clamp_retry_s(seconds: float) -> float:
    """A hint that neither invites a storm nor sends the caller away for long."""
    return min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)


def retry_after_s(num_missing: int, num_held: int, mean_hold_s: float) -> float:
    """When `num_missing` of `num_held` will be free. Little's law: num_held / mean_hold_s come back per second."""
    return clamp_retry_s(num_missing * mean_hold_s / max(num_held, 1))
