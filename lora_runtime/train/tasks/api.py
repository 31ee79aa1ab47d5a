"""What a task gives to a training run. Each task is one module beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import TaskType
from torch import Tensor, nn

from lora_runtime.train.loss import ClassCounts, TargetKind, find_loss, named_loss
from lora_runtime.train.metrics.classes import LabelScore
from lora_runtime.train.report.run import Confusion, Example
from lora_runtime.train.task_base import TaskBase
from lora_runtime.types import ProblemType, Task

Array = NDArray[Any]
Batch = dict[str, Tensor]

NUM_EXAMPLES = 8  # of a report
IGNORED = -100  # a label where there is no target, as transformers writes it


@dataclass(frozen=True, slots=True)
class Features:
    """Rows as the Trainer takes them: `input_ids` and the like, and `labels`, of each sequence."""

    rows: list[dict[str, Any]]
    num_truncated: int = 0
    num_skipped: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Both sides of a run."""

    train: Features
    valid: Features


@dataclass(frozen=True, slots=True)
class TaskShape:
    """How a base is loaded for a task, and what of it PEFT saves beside the low-rank matrices."""

    auto_class: Any
    peft_type: TaskType
    heads: tuple[str, ...]  # modules that PEFT saves for this type without being told
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of `from_pretrained`
    needs_decoder: bool = False


class TrainTask(ABC):
    """One task of one run, its rows read and checked, no model yet.

    `encode` comes first; what `score` needs of it beyond the arrays, the task keeps.
    """

    kind: ClassVar[Task]
    target_kind: TargetKind
    selection: tuple[str, bool]  # the metric that the best pass is chosen by, and whether more is better
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    base_does_it: bool = False  # whether the base alone, without a trained head, can be measured too
    eval_rows_at_once: int = 32  # of a validation pass, at least

    def __init__(self, loss: str) -> None:
        self._loss_name = loss
        self._loss = find_loss(loss, self.target_kind)

    @property
    @abstractmethod
    def shape(self) -> TaskShape:
        """How the base is loaded."""

    @property
    @abstractmethod
    def num_rows(self) -> tuple[int, int]:
        """Training and validation rows, as they were read."""

    @abstractmethod
    def encode(self, base: TaskBase) -> Encoded:
        """Tokenise both sides; raises TrainingDataInvalid at a row that cannot be used."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Call the model on a batch of `collate` without its labels: [B, …] of what `predict` and `terms` take."""

    @abstractmethod
    def terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the loss takes: logits and targets, those without a target left out."""

    @abstractmethod
    def predict(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is kept of a batch of validation rows, [B, …]; other sizes are padded with -100."""

    @abstractmethod
    def score(self, predictions: Array, labels: Array) -> dict[str, float]:
        """Metrics of a validation pass, from `predict` and the labels of all its rows."""

    @abstractmethod
    def collate(self, base: TaskBase, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of rows of `Features`."""

    def num_tokens(self, row: Mapping[str, Any]) -> int:
        """Of a row of `Features`."""
        return len(row["input_ids"])

    def sample(self, model: nn.Module, base: TaskBase) -> dict[str, float]:
        """More metrics, of what the model makes of a few validation rows on its own."""
        del model, base
        return {}

    def baseline(self) -> dict[str, float]:
        """Metrics of the same answer for every row; empty where there is no such thing."""
        return {}

    def label_scores(self, predictions: Array, labels: Array) -> tuple[LabelScore, ...]:
        """Each label's own scores, for the report."""
        del predictions, labels
        return ()

    def confusion(self, predictions: Array, labels: Array) -> Confusion | None:
        """Which label was answered as which, for the report."""
        del predictions, labels
        return None

    def examples(self, base: TaskBase, predictions: Array, labels: Array) -> tuple[Example, ...]:
        """A few validation rows and the trained model's answers, for the report."""
        del base, predictions, labels
        return ()

    def class_counts(self) -> ClassCounts | None:
        """How often each class is a target of the training rows, after `encode`."""
        return None

    def metadata(self, base: TaskBase) -> dict[str, Any]:
        """Fields of `multilora.json` that are this task's own."""
        del base
        return {}

    def loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int) -> Tensor:
        """The run's loss over a batch."""
        if self._loss is None:
            self._loss = named_loss(self._loss_name, self.target_kind, self.class_counts())
        terms, targets = self.terms(logits, labels)
        if not len(targets):  # a window or a text cut before its first target
            return terms.sum()  # 0, and still of the graph that other processes wait for
        return self._loss(terms, targets, num_items)


def counts_of(classes: Array, num_classes: int) -> ClassCounts:
    """Of class indices [N], without -100."""
    kept = classes[classes != IGNORED].astype(np.int64)
    return ClassCounts(np.bincount(kept, minlength=num_classes), len(kept))


def pad_rows(base: TaskBase, rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Pad every list on the right to the longest: ids, masks, token types, and labels of tokens with -100."""
    fillers = {"input_ids": base.pad_token_id, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
    batch: Batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, list) and name in fillers:
            length = max(map(len, values))
            values = [[*value, *[fillers[name]] * (length - len(value))] for value in values]
        batch[name] = torch.tensor(values)
    return batch


def inputs_of(input_ids: Sequence[int], token_type_ids: Sequence[int] | None) -> dict[str, Any]:
    """The columns of one sequence."""
    columns: dict[str, Any] = {"input_ids": list(input_ids), "attention_mask": [1] * len(input_ids)}
    if token_type_ids is not None:
        columns["token_type_ids"] = list(token_type_ids)
    return columns
