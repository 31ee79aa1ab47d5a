"""The refusal of a tenant at one of its limits."""

from __future__ import annotations

from enum import StrEnum

from lora_runtime.errors import MultiloraError


class Quota(StrEnum):
    """Which limit refused; the values are the fields of Limits."""

    REQUESTS_PER_SECOND = "requests_per_second"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    MAX_CONCURRENT_REQUESTS = "max_concurrent_requests"
    MAX_QUEUED_SEQUENCES = "max_queued_sequences"


class QuotaExceeded(MultiloraError):
    """A tenant is at one of its limits. `retry_after_s` is None where waiting does not help."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, subject: str, quota: Quota, limit: float, retry_after_s: float | None) -> None:
        if retry_after_s is None:
            remedy = "waiting does not help: send less at once, or ask the operator for more"
        else:
            remedy = f"try again in {retry_after_s:.3g} s"
        shown = f"{limit:.15g}"
        super().__init__(
            f"tenant {subject} is at its limit {quota} = {shown}; {remedy}", subject=subject, quota=quota, limit=shown
        )
        self.subject = subject
        self.quota = quota
        self.limit = limit
        self.retry_after_s = retry_after_s
