"""Our own batches without the engine's queue, formed as the engine forms them."""

from __future__ import annotations

import torch

from lora_runtime.batch import Resident, Row
from lora_runtime.runtime import Runtime


def run_packed(runtime: Runtime, rows: list[Row], token_budget: int) -> list[torch.Tensor]:
    """Logits of each row; batches in the order of arrival up to the budget, rows of one adapter adjacent."""
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for batch in _batches(rows, token_budget):
        of_adapter: dict[Resident, list[int]] = {}
        for i in sorted(batch, key=lambda i: rows[i].sequence.num_tokens):
            of_adapter.setdefault(rows[i].resident, []).append(i)
        order = [i for indices in of_adapter.values() for i in indices]
        for i, logits in zip(order, runtime.runner.answers([rows[i] for i in order]), strict=True):
            outputs[i] = logits
    return outputs


def _batches(rows: list[Row], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    tokens = 0
    for i, row in enumerate(rows):
        if batches[-1] and tokens + row.sequence.num_tokens > token_budget:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += row.sequence.num_tokens
    return batches
