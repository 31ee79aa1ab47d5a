"""What a training run is told, what it reports, and whom it tells meanwhile. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.types import ProblemType

MIN_MAX_LENGTH = 8  # special tokens of a pair and a few of the texts
MAX_RANK = 256


class Schedule(StrEnum):
    """What the learning rate does after the warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """One run of `train_classifier`. A value that cannot be used raises InvalidRequest with its field."""

    base: str  # a folder, or a name on the hub
    train: Path
    out: Path  # the adapter folder to write
    valid: Path | None = None
    schema: ClassifySchema = field(default_factory=ClassifySchema)
    valid_share: float = 0.1  # of the training rows, when `valid` is None
    rank: int = 16
    alpha: float | None = None  # None: twice the rank
    dropout: float = 0.05  # on the input of A
    target_modules: tuple[str, ...] | None = None  # None: every linear of the encoder layers
    learning_rate: float = 1e-3
    schedule: Schedule = Schedule.LINEAR
    warmup_ratio: float = 0.1  # of all steps
    epochs: int = 10
    batch_size: int = 16
    max_length: int = 128  # tokens, special ones included
    seed: int = 0
    threads: int | None = None  # of torch on the CPU; None leaves them as they are
    overwrite: bool = False
    base_name: str | None = None  # the hint to write; None: the last part of `base`

    def __post_init__(self) -> None:
        _require(1 <= self.rank <= MAX_RANK, "rank", self.rank, f"1 to {MAX_RANK}")
        if self.alpha is not None:
            _require(0 < self.alpha < math.inf, "alpha", self.alpha, "greater than 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 up to, not including, 1")
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "greater than 0")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "0 up to, not including, 1")
        _require(0 < self.valid_share < 1, "valid_share", self.valid_share, "between 0 and 1")
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _require(self.max_length >= MIN_MAX_LENGTH, "max_length", self.max_length, f"{MIN_MAX_LENGTH} or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        _require(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")
        _require(self.target_modules != (), "target_modules", "empty", "names of linear modules")
        _require(bool(self.schema.separator), "separator", "empty", "a character that no label holds")

    @property
    def lora_alpha(self) -> float:
        return 2 * self.rank if self.alpha is None else self.alpha


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise InvalidRequest(name, f"is {value}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What is about to run, once every input has been read and checked."""

    labels: tuple[str, ...]
    problem_type: ProblemType
    num_train_rows: int
    num_valid_rows: int
    num_truncated_rows: int  # of both, longer than `max_length` tokens
    num_steps: int  # optimizer steps of all epochs
    num_parameters: int  # trainable, the head included
    target_modules: tuple[str, ...]
    baseline: Mapping[str, float]  # metrics of the constant answer learnt from the training rows


@dataclass(frozen=True, slots=True)
class EpochReport:
    """One epoch. `metrics` are those of `metrics.classes.score`, on the validation rows."""

    epoch: int  # from 1
    train_loss: float  # mean over the epoch's steps
    valid_loss: float
    metrics: Mapping[str, float]
    best: bool  # of the epochs so far


@dataclass(frozen=True, slots=True)
class TrainReport:
    """A finished run; `out` holds the weights of `best`."""

    out: Path
    plan: TrainPlan
    epochs: tuple[EpochReport, ...]
    best: EpochReport
    seconds: float  # loading and writing included


class TrainObserver(Protocol):
    """Told of progress, in the thread that trains. Its exceptions end the run, and nothing is written."""

    def on_start(self, plan: TrainPlan) -> None: ...

    def on_step(self, step: int) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...


class SilentObserver:
    """An observer that draws nothing."""

    def on_start(self, plan: TrainPlan) -> None: ...

    def on_step(self, step: int) -> None: ...

    def on_epoch(self, report: EpochReport) -> None: ...
