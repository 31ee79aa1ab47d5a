"""What a search reports, and whom it tells meanwhile. Neither torch nor Optuna here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from lora_runtime.train.progress import SilentObserver, TrainObserver
from lora_runtime.train.search.space import Space, Value


class TrialState(StrEnum):
    """How a trial ended, or that it has not."""

    FINISHED = "finished"
    PRUNED = "pruned"  # ended early: worse than the median of the others after as many validation passes
    FAILED = "failed"  # diverged, ran out of memory, or its values do not go together
    INTERRUPTED = "interrupted"  # the same search goes on with it


@dataclass(frozen=True, slots=True)
class TrialReport:
    """One trial."""

    number: int  # from 1
    state: TrialState
    values: Mapping[str, Value]  # of every parameter of the space
    metric: float | None  # of its best validation pass; of a pruned one, of those it had
    num_passes: int  # validation passes that were compared
    seconds: float
    reason: str = ""  # why it failed


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """What is about to be searched."""

    space: Space
    num_trials: int
    done: tuple[TrialReport, ...]  # of earlier calls
    selection: str  # the metric that trials are compared by
    more_is_better: bool
    storage: Path

    def best(self, trials: Sequence[TrialReport]) -> TrialReport | None:
        """The finished one with the best metric, the first of equal ones."""
        finished = [trial for trial in trials if trial.state is TrialState.FINISHED and trial.metric is not None]
        sign = 1 if self.more_is_better else -1
        return max(finished, key=lambda trial: sign * (trial.metric or 0.0), default=None)


@dataclass(frozen=True, slots=True)
class SearchReport:
    """A search that has its trials; `out` holds the adapter of `best`."""

    out: Path
    plan: SearchPlan
    trials: tuple[TrialReport, ...]
    best: TrialReport
    seconds: float  # of all trials, those of earlier calls included


class SearchObserver(Protocol):
    """Told of progress, in the thread that searches."""

    def on_search(self, plan: SearchPlan) -> None: ...

    def on_trial(self, number: int, values: Mapping[str, Value]) -> TrainObserver:
        """Trial `number` begins; the answer is told of its training, and may interrupt it."""
        ...

    def on_trial_end(self, trial: TrialReport, *, best: bool) -> None:
        """`best`: of the trials so far."""
        ...


class SilentSearchObserver:
    """An observer that draws nothing."""

    def on_search(self, plan: SearchPlan) -> None: ...

    def on_trial(self, number: int, values: Mapping[str, Value]) -> TrainObserver:
        """Nothing."""
        del number, values
        return SilentObserver()

    def on_trial_end(self, trial: TrialReport, *, best: bool) -> None: ...
