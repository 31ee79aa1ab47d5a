"""From logits to the scores a caller sees."""

from __future__ import annotations

import torch

from lora_runtime.types import ProblemType


def scores_of(logits: torch.Tensor, problem_type: ProblemType) -> torch.Tensor:
    """[..., num_labels] → the same shape: softmax, a sigmoid per label, or the value itself for a regression."""
    if problem_type is ProblemType.SINGLE_LABEL:
        return logits.softmax(-1)
    if problem_type is ProblemType.MULTI_LABEL:
        return logits.sigmoid()
    return logits
