"""Labels, several labels, or a value, for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lora_runtime.train.loss import ClassCounts, TargetKind
from lora_runtime.train.metrics.classes import (
    SELECTION,
    LabelScore,
    baseline,
    confusion_matrix,
    label_scores,
    score,
)
from lora_runtime.train.report.run import Confusion, Example
from lora_runtime.train.rows.classify import ClassifyRow, load_classify_rows
from lora_runtime.train.settings import DataFiles
from lora_runtime.train.task_base import TaskBase
from lora_runtime.train.tasks.api import (
    NUM_EXAMPLES,
    Array,
    Batch,
    Encoded,
    Features,
    TaskShape,
    TrainTask,
    counts_of,
    pad_rows,
)
from lora_runtime.train.tasks.options import ClassifyOptions
from lora_runtime.types import ProblemType, Task

_TARGETS = {
    ProblemType.SINGLE_LABEL: TargetKind.CLASSES,
    ProblemType.MULTI_LABEL: TargetKind.MULTI_LABEL,
    ProblemType.REGRESSION: TargetKind.VALUES,
}


class ClassifyTask(TrainTask):
    """See `TrainTask`."""

    kind = Task.CLASSIFY

    def __init__(self, options: ClassifyOptions, data: DataFiles, seed: int, loss: str) -> None:
        self.problem_type = options.schema.problem_type
        self.target_kind = _TARGETS[self.problem_type]
        super().__init__(loss)
        self.rows = load_classify_rows(data.train, data.valid, options.schema, data.valid_share, seed)
        self.labels = self.rows.labels
        self.selection = SELECTION[self.problem_type]
        self._max_length = data.max_length
        self._targets = tuple(_targets(side, self.labels, self.problem_type) for side in self._sides)

    @property
    def _sides(self) -> tuple[tuple[ClassifyRow, ...], tuple[ClassifyRow, ...]]:
        return self.rows.train, self.rows.valid

    @property
    def shape(self) -> TaskShape:
        options = {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: index for index, name in enumerate(self.labels)},
            "problem_type": self.problem_type.value if self.problem_type else None,
        }
        heads = ("classifier", "score")
        return TaskShape(AutoModelForSequenceClassification, TaskType.SEQ_CLS, heads, options)

    @property
    def num_rows(self) -> tuple[int, int]:
        return len(self.rows.train), len(self.rows.valid)

    def encode(self, base: TaskBase) -> Encoded:
        """Cut to `max_length` tokens, the longer text of a pair first."""
        sides = zip(self._sides, self._targets, strict=True)
        return Encoded(*(_encode(rows, targets, base, self._max_length) for rows, targets in sides))

    def collate(self, base: TaskBase, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return pad_rows(base, rows)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, num_labels]"""
        return model(**batch).logits

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (logits.squeeze(-1) if self.problem_type is ProblemType.REGRESSION else logits), labels

    def predict(self, logits: Tensor, labels: Tensor) -> Tensor:
        del labels
        return logits.float()

    def score(self, predictions: Array, labels: Array) -> dict[str, float]:
        assert self.problem_type is not None
        return score(self.problem_type, predictions, labels)

    def baseline(self) -> dict[str, float]:
        assert self.problem_type is not None
        return baseline(self.problem_type, *self._targets)

    def label_scores(self, predictions: Array, labels: Array) -> tuple[LabelScore, ...]:
        assert self.problem_type is not None
        return label_scores(self.problem_type, predictions, labels, self.labels)

    def confusion(self, predictions: Array, labels: Array) -> Confusion | None:
        if self.problem_type is not ProblemType.SINGLE_LABEL:
            return None
        return Confusion(self.labels, confusion_matrix(predictions, labels).tolist())

    def examples(self, base: TaskBase, predictions: Array, labels: Array) -> tuple[Example, ...]:
        del base
        rows = zip(self.rows.valid, predictions, labels, strict=True)
        return tuple(
            Example(_given(row), self._named(truth, wanted=True), self._named(found, wanted=False))
            for row, found, truth in islice(rows, NUM_EXAMPLES)
        )

    def _named(self, values: Array, *, wanted: bool) -> str:
        """Logits, or the targets of the row, in words."""
        if self.problem_type is ProblemType.REGRESSION:
            return f"{float(np.asarray(values).reshape(-1)[0]):.4g}"
        if self.problem_type is ProblemType.MULTI_LABEL:
            limit = 0.5 if wanted else 0.0
            return ", ".join(name for name, value in zip(self.labels, values, strict=True) if value > limit) or "none"
        return self.labels[int(values) if wanted else int(values.argmax())]

    def class_counts(self) -> ClassCounts | None:
        train = self._targets[0]
        if self.problem_type is ProblemType.MULTI_LABEL:
            return ClassCounts(train.sum(0).astype(np.int64), len(train))
        return counts_of(train, len(self.labels)) if self.problem_type is ProblemType.SINGLE_LABEL else None

    def metadata(self, base: TaskBase) -> dict[str, Any]:
        del base
        return {"labels": self.labels, "problem_type": self.problem_type}


def _given(row: ClassifyRow) -> str:
    return row.text if row.text_pair is None else f"{row.text} / {row.text_pair}"


def _encode(rows: Sequence[ClassifyRow], targets: Array, base: TaskBase, max_length: int) -> Features:
    tokenizer = base.tokenizer
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    batch = tokenizer([row.text for row in rows], pairs or None, truncation="longest_first", max_length=max_length)
    columns = {name: batch[name] for name in tokenizer.model_input_names if name in batch}
    features = [
        {**{name: values[index] for name, values in columns.items()}, "labels": target}
        for index, target in enumerate(targets.tolist())
    ]
    # fast tokenizers keep what they cut off; a slow one does not tell
    return Features(features, sum(bool(encoding.overflowing) for encoding in batch.encodings or ()))


def _targets(rows: Sequence[ClassifyRow], labels: Sequence[str], problem_type: ProblemType) -> Array:
    if problem_type is ProblemType.REGRESSION:
        return np.array([row.value for row in rows], dtype=np.float32)
    index = {name: place for place, name in enumerate(labels)}
    if problem_type is ProblemType.SINGLE_LABEL:
        return np.array([index[row.labels[0]] for row in rows], dtype=np.int64)
    targets = np.zeros((len(rows), len(labels)), dtype=np.float32)
    for place, row in enumerate(rows):
        targets[place, [index[name] for name in row.labels]] = 1.0
    return targets
