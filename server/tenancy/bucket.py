"""A rate as a bucket that fills steadily: the arithmetic of one limit, without tenants."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

Clock = Callable[[], float]

_ROUNDING = 1e-9  # of the burst: who waited as long as told is not told to wait for a rounding error


class TokenBucket:
    """At most `burst + rate_per_s * t` in any t seconds, save that what is larger than the burst takes a full bucket.

    The balance may be negative: later requests wait until the debt is paid. A rate of 0 admits nothing.
    """

    def __init__(self, rate_per_s: float, burst: float, clock: Clock = time.monotonic) -> None:
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._clock = clock
        self._balance = burst
        self._filled_at = clock()

    @property
    def balance(self) -> float:
        now = self._clock()
        self._balance = min(self.burst, self._balance + self.rate_per_s * (now - self._filled_at))
        self._filled_at = now
        return self._balance

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken; 0.0: now. Takes nothing."""
        if self.rate_per_s <= 0:
            return math.inf
        missing = min(amount, self.burst) - self.balance
        return missing / self.rate_per_s if missing > _ROUNDING * self.burst else 0.0

    def take(self, amount: float) -> float:
        """Take `amount` and return 0.0, or take nothing and return the seconds to wait."""
        wait_s = self.wait_s(amount)
        if wait_s == 0.0:
            self.settle(amount)
        return wait_s

    def settle(self, amount: float) -> None:
        """Correct a charge by `amount` in any case, into debt if need be: what is charged was used already.

        Less than 0 gives back what was taken and not used.
        """
        self._balance = self.balance - amount  # read with the burst as its bound

    def retune(self, rate_per_s: float, burst: float) -> None:
        """Another rate from now on; the balance keeps its share of the burst."""
        share = self.balance / self.burst if self.burst > 0 else 1.0
        self.rate_per_s, self.burst = rate_per_s, burst
        self._balance = share * burst
