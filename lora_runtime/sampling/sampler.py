"""Logits of a batch to one token per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_runtime.sampling.draw import Limits, draw_from_all, draw_from_best, integer_weights, ranked
from lora_runtime.sampling.drawn import Drawn, Logprobs
from lora_runtime.sampling.processors import changes_logits, process_logits
from lora_runtime.sampling.row import RowState
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.sampling.transfer import on_device
from lora_runtime.sampling.uniform import uniforms


class Sampler:
    """Draws one token per row.

    **Semantics** of a row: `process_logits`; at temperature 0 the best token, of equals the lowest id; else
    `scores = logits / temperature`, top-k, top-p and min-p, each over what the one before left, and a draw with the
    row's uniform number of (seed, number of tokens generated). A row's token is the same bit for bit whatever rows
    are beside it, in whatever order.
    """

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Sequence[RowState]) -> Drawn:
        """`logits` [rows, vocab] fp32, on any device, are not changed; nor are the rows: the caller appends.

        On CUDA the tokens are on their way when it returns. Truncated draws wait for the device, the others do not.
        """
        assert rows and logits.shape[0] == len(rows) and logits.dtype == torch.float32
        processed = logits
        if any(changes_logits(row) for row in rows):
            processed = logits.clone()
            process_logits(processed, rows)
        is_finite = logits.amax(-1).isfinite()  # NaN counts as the best
        is_fine = is_finite if processed is logits else processed.amax(-1).isfinite()
        tokens = torch.where(is_fine & is_finite, _draw(processed, rows), -1)
        return Drawn(tokens, is_finite, _logprobs(logits, tokens, rows))

    def sample(self, logits: Tensor, rows: Sequence[RowState]) -> list[SampledToken]:
        """The tokens of `draw`."""
        return self.draw(logits, rows).results() if rows else []


def _draw(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """A token of each row, undefined where its best logit is not finite."""
    parts = [
        [k for k, row in enumerate(rows) if row.params.is_greedy],
        [k for k, row in enumerate(rows) if not row.params.is_greedy and row.params.truncates],
        [k for k, row in enumerate(rows) if not row.params.is_greedy and not row.params.truncates],
    ]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for part, draw in zip(parts, (_greedy, _truncated, _untruncated), strict=True):
        if part:
            if len(part) == len(rows):
                return draw(logits, rows)
            index = on_device(part, logits.device)
            tokens[index] = draw(logits[index], [rows[k] for k in part])
    return tokens


def _greedy(logits: Tensor, _: Sequence[RowState]) -> Tensor:
    return logits.argmax(-1)


def _truncated(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    temperature, min_p, top_p, uniform, top_k = _numbers(rows, logits.device)
    scores = logits / temperature.float()[:, None]
    limits = Limits(top_k.long().clamp(max=logits.shape[1]), top_p, min_p)
    return draw_from_best(scores, integer_weights(scores), limits, uniform)


def _untruncated(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    temperature, min_p, _, uniform, _ = _numbers(rows, logits.device)
    scores = logits / temperature.float()[:, None]
    restricts = any(row.params.min_p > 0 for row in rows)
    return draw_from_all(integer_weights(scores), min_p if restricts else None, uniform)


def _numbers(rows: Sequence[RowState], device: torch.device) -> tuple[Tensor, ...]:
    """Temperature, min_p, top_p, the uniform number, top_k of each row, in one transfer. 5 times [rows] fp64"""
    seeds = np.array([row.seed for row in rows], np.uint64)
    steps = np.array([row.num_new_tokens for row in rows], np.uint64)
    params = [row.params for row in rows]
    columns = np.stack([
        np.array([p.temperature for p in params], np.float64),
        np.array([p.min_p for p in params], np.float64),
        np.array([p.top_p for p in params], np.float64),
        uniforms(seeds, steps),
        np.array([p.top_k for p in params], np.float64),
    ])  # fmt: skip
    return on_device(columns, device).unbind(0)


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[RowState]) -> Logprobs | None:
    """Of the rows that want them, from raw logits."""
    told = [k for k, row in enumerate(rows) if row.params.logprobs is not None]
    if not told:
        return None
    if len(told) < len(rows):
        index = on_device(told, logits.device)
        logits, tokens = logits[index], tokens[index]
    logprobs = torch.log_softmax(logits, -1)
    chosen = tokens.clamp(min=0)[:, None]
    wanted = [rows[k].params.logprobs or 0 for k in told]
    width = min(max(wanted), logits.shape[1])
    values, ids = _best(logprobs, width) if width else (logprobs[:, :0], chosen[:, :0])
    return Logprobs(told, wanted, logprobs.gather(1, chosen)[:, 0], values, ids)


def _best(logprobs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` best of each row and their ids, of equals the lower id first, at the border too."""
    vocab_size = logprobs.shape[1]
    values, ids = ranked(logprobs, min(width + 1, vocab_size))
    if width < vocab_size:
        is_tied = values[:, width - 1] == values[:, width]
        if bool(is_tied.any()):
            tied_values, tied_ids = ranked(logprobs[is_tied], vocab_size)
            values[is_tied], ids[is_tied] = tied_values[:, : width + 1], tied_ids[:, : width + 1]
    return values[:, :width], ids[:, :width]
