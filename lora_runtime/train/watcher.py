"""The Trainer's events as reports; the best pass's weights; when a run ends early, and where it can go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.checkpoints import BEST_FILE, HISTORY_FILE, History
from lora_runtime.train.lora import adapter_state, restore_state
from lora_runtime.train.progress import EvalReport, TrainObserver
from lora_runtime.train.tasks.api import Array

_PREFIX, _LOSS = "eval_", "eval_loss"
OTHERS = frozenset({"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"})


@dataclass
class Watcher(TrainerCallback):
    """One run, watched in the thread that trains. `sample` gives metrics beside those of the predictions."""

    observer: TrainObserver
    selection: tuple[str, bool]
    steps_per_epoch: int
    sample: Callable[[nn.Module], dict[str, float]]
    patience: int | None
    keeps_checkpoints: bool
    history: History = field(default_factory=History)
    best_weights: dict[str, Tensor] | None = None
    best_predictions: tuple[Array, Array] | None = None  # and labels; None where the best pass was before a resumption
    last_predictions: tuple[Array, Array] | None = None
    stopped_early: bool = False
    _loss: float = 0.0  # of the step that is under way
    _interrupted: bool = False

    def add_loss(self, loss: Tensor) -> None:
        """One forward pass of the step under way is done."""
        self._loss += float(loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        del args, kwargs
        loss, self._loss = self._loss, 0.0
        self.history.step_losses.append(loss)
        try:
            self.observer.on_step(state.global_step, loss)
        except KeyboardInterrupt:
            if not self.keeps_checkpoints:
                raise
            self._interrupted = True  # `on_save` raises it, when there is something to go on from
            # at the end of an epoch the pass that is due comes first, and a checkpoint with it
            control.should_save = control.should_save or state.global_step % self.steps_per_epoch != 0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        del args, kwargs
        assert metrics is not None
        assert model is not None
        names = (name.removeprefix(_PREFIX) for name in metrics if name.startswith(_PREFIX))
        found = {name: float(metrics[f"{_PREFIX}{name}"]) for name in names if name not in OTHERS}
        found |= self.sample(model)
        loss = float(metrics[_LOSS])
        best = self._is_best(found, loss)
        if best:
            self.best_weights, self.best_predictions = adapter_state(model), self.last_predictions
        report = EvalReport(float(state.epoch or 0), state.global_step, self._train_loss(), loss, found, best)
        self.history.passes.append(report)
        if self.patience is not None and self._passes_since_best() >= self.patience:
            self.stopped_early = control.should_training_stop = True
        self.observer.on_eval(report)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        del control, kwargs
        if args.should_save:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            if self.best_weights is not None:
                save_file(self.best_weights, folder / BEST_FILE)
            self.history.write(folder / HISTORY_FILE)
        if self._interrupted:
            raise KeyboardInterrupt

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: what was reported before, and the best weights so far."""
        self.history = History.read(checkpoint / HISTORY_FILE)
        if (checkpoint / BEST_FILE).exists():
            self.best_weights = load_file(checkpoint / BEST_FILE)

    @property
    def best(self) -> EvalReport | None:
        return next((report for report in reversed(self.history.passes) if report.best), None)

    def restore_best(self, model: nn.Module) -> EvalReport:
        """Give `model` the weights of the best pass; raises InvalidRequest when no pass had a finite loss."""
        best = self.best
        if best is None or self.best_weights is None:
            raise InvalidRequest("learning_rate", "the loss was never finite: training diverged; lower it")
        restore_state(model, self.best_weights)
        return best

    def _is_best(self, metrics: Mapping[str, float], loss: float) -> bool:
        if not math.isfinite(loss):
            return False
        best = self.best
        return best is None or self._key(metrics, loss) > self._key(best.metrics, best.valid_loss)

    def _key(self, metrics: Mapping[str, float], loss: float) -> tuple[float, float]:
        """Higher is better; ties go to the lower loss."""
        name, more_is_better = self.selection
        return (metrics[name] if more_is_better else -metrics[name]), -loss

    def _passes_since_best(self) -> int:
        count = 0
        for report in reversed(self.history.passes):
            if report.best:
                break
            count += 1
        return count

    def _train_loss(self) -> float:
        """Mean over the steps since the pass before."""
        since = self.history.passes[-1].step if self.history.passes else 0
        losses = self.history.step_losses[since:]
        return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) and losses else math.nan
