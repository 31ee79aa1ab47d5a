"""When to try again."""

from __future__ import annotations

_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 5.0


def clamp_retry_s(seconds: float) -> float:
    """A hint that neither invites a storm nor sends the caller away for long."""
    return min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)
