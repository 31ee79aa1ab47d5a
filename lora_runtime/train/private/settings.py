"""What private training is told, and what it guarantees. Neither torch nor Opacus here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_runtime.errors import InvalidRequest

DELTA_ROWS = 10  # the default δ is 1 over so many times the training rows


@dataclass(frozen=True, slots=True)
class Privacy:
    """What is asked for: ε for the run, or the noise whose ε is then reported."""

    epsilon: float | None = None
    noise_multiplier: float | None = None  # standard deviation of the noise over `max_grad_norm`
    max_grad_norm: float = 1.0  # L2 norm, over all trained parameters, that a row's gradient is cut to
    delta: float | None = None  # None: 1 / (10 · training rows)

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise InvalidRequest("epsilon", "or noise_multiplier is needed for private training, and one of them alone")
        for name in ("epsilon", "noise_multiplier", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidRequest(name, f"is {value}; allowed: greater than 0")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InvalidRequest("delta", f"is {self.delta}; allowed: between 0 and 1")


@dataclass(frozen=True, slots=True)
class PrivacyBudget:
    """(ε, δ) of a number of steps, and what it follows from."""

    epsilon: float
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float  # the probability of each row to be in a step's sample
    num_rows: int  # training rows
    num_steps: int

    @property
    def expected_batch_size(self) -> float:
        return self.sample_rate * self.num_rows

    @property
    def warning(self) -> str | None:
        """Where δ allows what nobody wants: to publish a row or so at random."""
        if self.delta < 1 / self.num_rows:
            return None
        message = f"delta {self.delta:g} is not below 1 / {self.num_rows} training rows"
        return f"{message}, so that a mechanism that gives a row away could satisfy it; choose a lower one"

    def __str__(self) -> str:
        sample = f"Poisson samples of {self.expected_batch_size:.4g} of {self.num_rows} rows"
        noise = f"noise multiplier {self.noise_multiplier:.4g}, gradients of rows cut to {self.max_grad_norm:g}"
        return f"ε {self.epsilon:.4g} at δ {self.delta:.3g}: {self.num_steps} steps, {sample}, {noise}"
