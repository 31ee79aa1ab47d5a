"""Noise from ε and ε from noise: Rényi differential privacy of the sampled Gaussian mechanism, as Opacus computes it.

An upper bound (Mironov 2017; Mironov, Talwar and Zhang 2019). Sound for Poisson samples, which `trainer.py` draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.private.settings import DELTA_ROWS, Privacy, PrivacyBudget


def plan_privacy(privacy: Privacy, num_rows: int, steps_per_epoch: int, epochs: int) -> PrivacyBudget:
    """The budget of a whole run, in which every row is in a step's sample with probability 1 / `steps_per_epoch`.

    Raises InvalidRequest on `epsilon` when no noise is enough for it.
    """
    delta = 1 / (DELTA_ROWS * num_rows) if privacy.delta is None else privacy.delta
    rate, steps = 1 / steps_per_epoch, steps_per_epoch * epochs
    noise = privacy.noise_multiplier or _noise_for(privacy.epsilon or math.nan, delta, rate, steps)
    epsilon = epsilon_of(noise, rate, steps, delta)
    return PrivacyBudget(epsilon, delta, noise, privacy.max_grad_norm, rate, num_rows, steps)


def spent_privacy(plan: PrivacyBudget, num_steps: int) -> PrivacyBudget:
    """The budget of the steps that were taken: fewer than planned after an early stop."""
    epsilon = epsilon_of(plan.noise_multiplier, plan.sample_rate, num_steps, plan.delta)
    return PrivacyBudget(
        epsilon, plan.delta, plan.noise_multiplier, plan.max_grad_norm, plan.sample_rate, plan.num_rows, num_steps
    )


def epsilon_of(noise_multiplier: float, sample_rate: float, num_steps: int, delta: float) -> float:
    """ε of so many steps at δ."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, num_steps)]
    with _quiet():
        return float(accountant.get_epsilon(delta))


def _noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet():
            return get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="rdp"
            )
    except ValueError:
        message = f"{epsilon:g} at delta {delta:g} cannot be kept over {steps} steps by any noise"
        raise InvalidRequest("epsilon", f"{message}; raise one of them, or train for fewer epochs") from None


@contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        # at the end of the orders the bound is looser than it could be, and still a bound
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield
