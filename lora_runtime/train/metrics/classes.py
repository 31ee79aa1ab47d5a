"""Metrics of a validation pass, in numpy.

Macro-F1 is the mean over the labels that occur in the truth or in the predictions, as scikit-learn's
`f1_score(average="macro")` takes it for single labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_runtime.types import ProblemType

Array = NDArray[Any]

# What the best epoch is chosen by, and whether more is better; ties go to the lower validation loss.
SELECTION = {
    ProblemType.SINGLE_LABEL: ("accuracy", True),
    ProblemType.MULTI_LABEL: ("macro_f1", True),
    ProblemType.REGRESSION: ("mse", False),
}


def score(problem_type: ProblemType, logits: Array, targets: Array) -> dict[str, float]:
    """Metrics of one pass. `logits` is [N, num_labels].

    Single label: `targets` are [N] class indices; accuracy and macro_f1. Multi label: [N, num_labels] of 0
    and 1; the same, where a label is predicted above a score of 0.5 (a logit of 0) and accuracy counts rows
    with every label right. Regression: [N] values, of logits [N, 1]; mse, mae and pearson.
    """
    if problem_type is ProblemType.REGRESSION:
        return _regression(logits.reshape(-1), targets.reshape(-1))
    predicted, truth = _memberships(problem_type, logits, targets)
    return {"accuracy": float((predicted == truth).all(axis=1).mean()), "macro_f1": macro_f1(predicted, truth)}


def _memberships(problem_type: ProblemType, logits: Array, targets: Array) -> tuple[Array, Array]:
    """Boolean [N, num_labels] of what is predicted and of what is true."""
    if problem_type is ProblemType.MULTI_LABEL:
        return logits > 0, targets > 0.5
    columns = np.arange(logits.shape[1])
    return logits.argmax(axis=1)[:, None] == columns, targets[:, None] == columns


def macro_f1(predicted: Array, truth: Array) -> float:
    """Mean F1 of the columns of two boolean [N, num_labels]; a column that is False in both is left out."""
    hits = (predicted & truth).sum(axis=0)
    total = predicted.sum(axis=0) + truth.sum(axis=0)  # 2·TP + FP + FN
    occurring = total > 0
    if not occurring.any():
        return 0.0
    return float((2.0 * hits[occurring] / total[occurring]).mean())


def baseline(problem_type: ProblemType, train_targets: Array, valid_targets: Array) -> dict[str, float]:
    """`score` of a constant answer: the commonest class or label set, or the mean, of the training rows."""
    if problem_type is ProblemType.REGRESSION:
        constant = np.array([train_targets.mean()])
    else:
        kinds, counts = np.unique(train_targets, axis=0, return_counts=True)
        constant = kinds[counts.argmax()]
        if problem_type is ProblemType.SINGLE_LABEL:
            constant = np.arange(int(max(train_targets.max(), valid_targets.max())) + 1) == constant
        constant = np.where(constant, 1.0, -1.0)
    return score(problem_type, np.tile(constant, (len(valid_targets), 1)), valid_targets)


def _regression(predicted: Array, truth: Array) -> dict[str, float]:
    predicted, truth = predicted.astype(np.float64), truth.astype(np.float64)
    difference = predicted - truth
    spread = predicted.std() * truth.std()
    covariance = ((predicted - predicted.mean()) * (truth - truth.mean())).mean()
    return {
        "mse": float((difference**2).mean()),
        "mae": float(np.abs(difference).mean()),
        "pearson": float(covariance / spread) if spread > 0 else 0.0,
    }


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label of a table; shares from 0 to 1. A share of nothing is 0, as scikit-learn's `zero_division=0`."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int  # how often it is true

    @classmethod
    def of(cls, label: str, hits: int, predicted: int, support: int) -> LabelScore:
        """From how often the label was right, predicted, and true."""
        return cls(
            label,
            hits / predicted if predicted else 0.0,
            hits / support if support else 0.0,
            2 * hits / (predicted + support) if predicted + support else 0.0,
            support,
        )


def label_scores(
    problem_type: ProblemType, logits: Array, targets: Array, labels: Sequence[str]
) -> tuple[LabelScore, ...]:
    """Every label's own scores, in the head's order, of what `score` takes; () for a regression."""
    if problem_type is ProblemType.REGRESSION:
        return ()
    predicted, truth = _memberships(problem_type, logits, targets)
    counts = zip((predicted & truth).sum(axis=0), predicted.sum(axis=0), truth.sum(axis=0), strict=True)
    return tuple(LabelScore.of(label, *map(int, found)) for label, found in zip(labels, counts, strict=True))


def confusion_matrix(logits: Array, targets: Array) -> Array:
    """int64 [num_labels, num_labels] of single-label rows: how often the row's label was answered as the column's."""
    num_labels = logits.shape[1]
    cells = targets.astype(np.int64) * num_labels + logits.argmax(axis=1)
    return np.bincount(cells, minlength=num_labels**2).reshape(num_labels, num_labels).astype(np.int64)
