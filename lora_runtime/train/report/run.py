"""All that the report of a run says, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_runtime.train.metrics.classes import LabelScore


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """One validation pass. A loss is None, or not finite, where there is none."""

    step: int  # optimizer steps so far
    epoch: float  # passes over the training rows so far
    train_loss: float | None  # mean since the pass before
    valid_loss: float | None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Example:
    """A validation row, and what the trained model makes of it."""

    given: str
    expected: str
    answered: str


@dataclass(frozen=True, slots=True)
class Confusion:
    """`counts[i][j]`: how often a row of label i was answered as label j."""

    labels: tuple[str, ...]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class RunReport:
    """A finished run. `best` is the point of `history` whose weights were kept."""

    title: str
    base: str
    task: str
    settings: Mapping[str, object]
    rows: Mapping[str, int]  # such as training, validation, cut to the maximum length
    history: tuple[HistoryPoint, ...]
    best: HistoryPoint
    selected_by: str  # the metric that `best` is best by
    baseline: Mapping[str, float]  # the same metrics without training
    baseline_of: str  # what the baseline is: the constant answer, or the base alone
    seconds: float
    versions: Mapping[str, str]
    label_scores: tuple[LabelScore, ...] = ()
    confusion: Confusion | None = None
    examples: tuple[Example, ...] = ()
    sections: Mapping[str, str] = field(default_factory=dict[str, str])  # more Markdown, by heading
