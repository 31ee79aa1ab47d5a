"""From a head's tensor to the output of a request, in plain values."""

from __future__ import annotations

import torch

from lora_runtime.heads.scores import scores_of
from lora_runtime.types import (
    AdapterCard,
    Classification,
    Embedding,
    NextToken,
    Output,
    SpanLogits,
    Task,
    TokenClassification,
)


def output_of(task: Task, tensor: torch.Tensor, card: AdapterCard) -> Output:
    """`tensor` as TaskHead.run gives it for a row of `task`."""
    match task:
        case Task.CLASSIFY:
            return Classification(tuple(tensor.tolist()), tuple(scores_of(tensor, card.problem_type).tolist()))
        case Task.CLASSIFY_TOKENS:
            return TokenClassification(tuple(map(tuple, tensor.tolist())))
        case Task.ANSWER:
            return SpanLogits(tuple(tensor[:, 0].tolist()), tuple(tensor[:, 1].tolist()))
        case Task.EMBED:
            return Embedding(tuple(tensor.tolist()))
        case Task.GENERATE:
            return NextToken(tuple(tensor.tolist()))
