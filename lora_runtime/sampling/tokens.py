"""A drawn token and its log-probabilities. No torch here."""

from __future__ import annotations

from typing import NamedTuple


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


class SampledToken(NamedTuple):
    """One row's result.

    Log-probabilities are of the model itself: log-softmax of the raw logits, before penalties, masks and temperature
    (vLLM's default `logprobs_mode`, `raw_logprobs`). They are there when `params.logprobs` is not None.
    """

    token_id: int | None  # None: the row's logits are not finite, or its mask allows no token
    logprob: float | None = None  # of the drawn token
    top_logprobs: tuple[TokenLogprob, ...] = ()  # the model's `params.logprobs` best, best first, then by id
    is_finite: bool = True  # False: the row's best logit is NaN or infinite, whatever its mask allows
