"""Penalties and masks on the logits of a batch, in place, before a token is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_runtime.sampling.row import Ids, RowState
from lora_runtime.sampling.transfer import on_device


def changes_logits(row: RowState) -> bool:
    """Whether `process_logits` does anything to this row now."""
    return row.params.has_penalties or row.mask is not None or len(row.blocked) > 0


def process_logits(logits: Tensor, rows: Sequence[RowState]) -> None:
    """Penalties, then `min_new_tokens`, then the rows' masks. [rows, vocab] fp32, in place."""
    _apply_penalties(logits, rows)
    _block(logits, rows)
    _apply_masks(logits, rows)


def _apply_penalties(logits: Tensor, rows: Sequence[RowState]) -> None:
    """Repetition: `l < 0 ? l * r : l / r` of seen tokens (transformers); then `l -= presence * (count > 0) +
    frequency * count` of generated ones (OpenAI), in the order of vLLM."""
    penalised = [index for index, row in enumerate(rows) if row.params.has_penalties]
    seen = [rows[index].seen for index in penalised]
    if not any(len(ids) for ids, _ in seen):
        return
    lengths = [len(ids) for ids, _ in seen]
    ids = np.concatenate([ids for ids, _ in seen])
    counts = np.concatenate([counts for _, counts in seen])
    factors = np.array([_penalties(rows[index]) for index in penalised], np.float32)  # [penalised, 3]
    places, kept = _places(np.repeat(penalised, lengths), ids, logits)
    numbers = np.concatenate([np.repeat(factors, lengths, 0), counts[:, None]], 1)[kept]  # [seen, 4]
    repetition, presence, frequency, count = on_device(numbers, logits.device).unbind(1)
    values = logits[places]
    values = torch.where(values < 0, values * repetition, values / repetition)
    logits[places] = values - presence * (count > 0) - frequency * count


def _penalties(row: RowState) -> tuple[float, float, float]:
    params = row.params
    return params.repetition_penalty, params.presence_penalty, params.frequency_penalty


def _block(logits: Tensor, rows: Sequence[RowState]) -> None:
    blocked = [row.blocked for row in rows]
    if any(len(ids) for ids in blocked):
        index = np.repeat(np.arange(len(rows)), [len(ids) for ids in blocked])
        places, _ = _places(index, np.concatenate(blocked), logits)
        logits[places] = -torch.inf


def _places(index: Ids, ids: Ids, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Ids]:
    """Rows and tokens to index logits with, and which of `ids` they are: a model may have fewer logits than tokens."""
    kept = np.flatnonzero(ids < logits.shape[1])
    both = on_device(np.stack([index[kept], ids[kept]]), logits.device)
    return (both[0], both[1]), kept


def _apply_masks(logits: Tensor, rows: Sequence[RowState]) -> None:
    masked = [(index, row.mask) for index, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return
    vocab_size = logits.shape[1]
    bitmask = np.zeros((len(masked), (vocab_size + 7) // 8), np.uint8)
    for place, (_, mask) in enumerate(masked):
        allowed = mask.allowed()[: bitmask.shape[1]]
        bitmask[place, : len(allowed)] = allowed
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = (on_device(bitmask, logits.device)[:, :, None] >> shifts) & 1  # [masked, bytes, 8]
    forbidden = bits.reshape(len(masked), -1)[:, :vocab_size] == 0
    index = on_device([index for index, _ in masked], logits.device)
    logits[index] = logits[index].masked_fill(forbidden, -torch.inf)
