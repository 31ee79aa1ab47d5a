"""Tokens that a batch drew, on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_runtime.sampling.tokens import SampledToken, TokenLogprob
from lora_runtime.sampling.transfer import ToHost


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the rows that asked for them."""

    rows: Sequence[int]
    counts: Sequence[int]  # how many of the best each wants
    own: Tensor  # [rows]: of the drawn token
    best: Tensor  # [rows, widest], best first
    best_ids: Tensor  # [rows, widest]


class Drawn:
    """A token for each row, copied while the device goes on."""

    def __init__(self, tokens: Tensor, is_finite: Tensor, logprobs: Logprobs | None) -> None:
        """`tokens` [rows] int64, -1: none; `is_finite` [rows]: whether the row's best logit is a number."""
        self.tokens = tokens
        found = [tokens, is_finite]
        if logprobs is not None:
            found += [logprobs.own, logprobs.best, logprobs.best_ids]
        self._logprobs = logprobs
        self._host = ToHost(found)

    def results(self) -> list[SampledToken]:
        """Wait for them."""
        tokens, finite, *logprobs = (one.tolist() for one in self._host.wait())
        results = [
            SampledToken(token if token >= 0 else None, is_finite=fine)
            for token, fine in zip(tokens, finite, strict=True)
        ]
        if self._logprobs is not None:
            told = zip(self._logprobs.rows, self._logprobs.counts, *logprobs, strict=True)
            for k, count, own, best, names in told:
                if results[k].token_id is not None:
                    top = tuple(TokenLogprob(*pair) for pair in zip(names[:count], best[:count], strict=True))
                    results[k] = results[k]._replace(logprob=own, top_logprobs=top)
        return results
