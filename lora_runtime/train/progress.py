"""What a training run reports, and whom it tells meanwhile. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_runtime.train.private.settings import PrivacyBudget
from lora_runtime.types import ProblemType, Task


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What is about to run, once every input has been read and checked."""

    task: Task
    labels: tuple[str, ...]  # of a task that has them
    problem_type: ProblemType | None  # of a classifier of texts
    num_train_rows: int
    num_valid_rows: int
    num_truncated_rows: int  # of both, longer than `max_length` tokens
    num_skipped_rows: int  # of both, with nothing left to learn from within `max_length`
    num_steps: int  # optimizer steps of all epochs
    num_parameters: int  # trainable, the head included
    target_modules: tuple[str, ...]
    baseline: Mapping[str, float]  # metrics of an answer that took no training; empty where there is none
    baseline_of: str  # what gives that answer
    selection: str  # the metric that the best pass is chosen by
    device: str
    num_processes: int = 1
    privacy: PrivacyBudget | None = None  # of all steps, where training is private


@dataclass(frozen=True, slots=True)
class EvalReport:
    """One validation pass."""

    epoch: float  # passes over the training rows so far
    step: int  # optimizer steps so far
    train_loss: float  # mean over the steps since the pass before
    valid_loss: float
    metrics: Mapping[str, float]
    best: bool  # of the passes so far


@dataclass(frozen=True, slots=True)
class TrainReport:
    """A finished run; `out` holds the weights of `best`."""

    out: Path
    plan: TrainPlan
    passes: tuple[EvalReport, ...]
    best: EvalReport
    step_losses: tuple[float, ...]  # of every optimizer step
    seconds: float  # loading and writing included
    stopped_early: bool = False  # by `patience`
    privacy: PrivacyBudget | None = None  # of the steps that were taken


class TrainObserver(Protocol):
    """Told of progress, in the thread that trains.

    KeyboardInterrupt from `on_step` ends the run after a checkpoint. Any other exception ends it at once, and nothing
    is left: a search prunes so.
    """

    def on_start(self, plan: TrainPlan) -> None: ...

    def on_step(self, step: int, loss: float) -> None:
        """`step` optimizer steps are done; `loss` is the last one's."""
        ...

    def on_eval(self, report: EvalReport) -> None: ...


class SilentObserver:
    """An observer that draws nothing."""

    def on_start(self, plan: TrainPlan) -> None: ...

    def on_step(self, step: int, loss: float) -> None: ...

    def on_eval(self, report: EvalReport) -> None: ...
