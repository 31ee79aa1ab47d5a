"""Tokens that a batch drew, on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.sampling.tokens import SampledToken, TokenLogprob


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
        self._host = found
        self._arrived: torch.cuda.Event | None = None
        if tokens.is_cuda:  # page-locked, or the copy would wait for all that was launched
            self._host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in found]
            for target, source in zip(self._host, found, strict=True):
                target.copy_(source, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tokens.device))

    def results(self) -> list[SampledToken]:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, finite, *logprobs = (one.tolist() for one in self._host)
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
