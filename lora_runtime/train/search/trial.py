"""One trial: its settings, its comparison with the others after every validation pass, and how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_runtime.errors import InvalidRequest, MultiloraError
from lora_runtime.train.checkpoints import is_resumable
from lora_runtime.train.progress import EvalReport, TrainObserver, TrainPlan
from lora_runtime.train.run import train
from lora_runtime.train.search.progress import TrialState
from lora_runtime.train.search.space import PARAMETERS, Value, applied
from lora_runtime.train.search.store import values_of
from lora_runtime.train.settings import TrainSettings

if TYPE_CHECKING:
    from optuna.trial import Trial


class _Pruned(MultiloraError):
    """Ends a trial that is not worth its time."""


class _PruningObserver:
    """Tells Optuna of every validation pass, and ends the trial that it gives up."""

    def __init__(self, trial: Trial, selection: str, eval_steps: int | None, epochs: int, inner: TrainObserver) -> None:
        self._trial = trial
        self._selection = selection
        self._eval_steps = eval_steps
        self._epochs = epochs
        self._inner = inner
        self._num_steps = 0

    def on_start(self, plan: TrainPlan) -> None:
        self._num_steps = plan.num_steps
        self._inner.on_start(plan)

    def on_step(self, step: int, loss: float) -> None:
        self._inner.on_step(step, loss)

    def on_eval(self, report: EvalReport) -> None:
        """Compare; a resumed trial repeats no pass that was told before."""
        self._inner.on_eval(report)
        number = round(report.step / (self._eval_steps or self._num_steps / self._epochs))  # of the pass, from 1
        told = self._trial.study.get_trials(deepcopy=False)[self._trial.number].intermediate_values
        if number not in told:
            self._trial.report(report.metrics[self._selection], number)
        if report.step < self._num_steps and self._trial.should_prune():
            raise _Pruned("worse than the median of the trials before it")


def trial_folder(work: Path, number: int) -> Path:
    """Where the trial of that number (from 1) is written, under the name of the adapter, which its report bears."""
    return work / f"trial-{number}"


def trial_settings(settings: TrainSettings, values: Mapping[str, Value], folder: Path, number: int) -> TrainSettings:
    """The run of one trial; raises InvalidRequest where its values do not go together.

    With `eval_steps` its validation passes come after as many rows as those of the others, whatever its batches.
    """
    run = settings.run
    out = folder / run.out.name
    board = None if run.tensorboard is None else run.tensorboard / f"trial-{number}"
    own = replace(run, out=out, overwrite=True, resume=is_resumable(out), tensorboard=board)
    made = applied(settings, values).changed(run=own)
    if (steps := settings.optim.eval_steps) is None:
        return made
    rows = steps * settings.optim.batch_size * settings.optim.gradient_accumulation
    return made.changed(eval_steps=max(1, round(rows / (made.optim.batch_size * made.optim.gradient_accumulation))))


def run_trial(
    settings: TrainSettings, trial: Trial, folder: Path, selection: str, observer: TrainObserver
) -> tuple[TrialState, float | None, str]:
    """Train it: its state, its metric, and why it failed.

    What would fail every other trial as well passes through, and so does KeyboardInterrupt.
    """
    values = values_of(trial)
    try:
        made = trial_settings(settings, values, folder, trial.number + 1)
        report = train(made, _PruningObserver(trial, selection, made.optim.eval_steps, made.optim.epochs, observer))
    except _Pruned:
        return TrialState.PRUNED, None, ""
    except InvalidRequest as error:
        fields = {PARAMETERS[name].field for name in values} | {"learning_rate"}  # blamed where a run diverged
        if error.field not in fields:
            raise
        return TrialState.FAILED, None, error.message
    except torch.OutOfMemoryError:
        return TrialState.FAILED, None, "the device ran out of memory"
    return TrialState.FINISHED, report.best.metrics[selection], ""
