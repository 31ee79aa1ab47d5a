"""The training loop: transformers' Trainer, a validation pass an epoch, the best epoch kept in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.metrics.classes import SELECTION, Array, score
from lora_runtime.train.rows.classify import ClassifyRow
from lora_runtime.train.settings import EpochReport, Schedule, TrainObserver, TrainSettings
from lora_runtime.train.task_model import trainable_state
from lora_runtime.types import ProblemType

WEIGHT_DECAY = 0.01
_SCHEDULERS = {
    Schedule.LINEAR: "linear",
    Schedule.COSINE: "cosine",
    Schedule.CONSTANT: "constant_with_warmup",
}
_LOSS = "eval_loss"


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Tokenised rows for the Trainer, and their targets as `metrics.classes.score` takes them."""

    features: list[dict[str, Any]]
    targets: Array
    num_truncated: int


def encode(
    rows: Sequence[ClassifyRow], labels: Sequence[str], tokenizer: Tokenizer, settings: TrainSettings
) -> EncodedRows:
    """Tokenise `rows`, cut to `max_length` tokens, the longer text of a pair first."""
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    batch = tokenizer(
        [row.text for row in rows], pairs or None, truncation="longest_first", max_length=settings.max_length
    )
    targets = _targets(rows, labels, settings.schema.problem_type)
    columns = {name: batch[name] for name in tokenizer.model_input_names if name in batch}
    features = [
        {**{name: values[index] for name, values in columns.items()}, "labels": target}
        for index, target in enumerate(targets.tolist())
    ]
    # fast tokenizers keep what they cut off; a slow one does not tell
    num_truncated = sum(bool(encoding.overflowing) for encoding in batch.encodings or ())
    return EncodedRows(features, targets, num_truncated)


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


def num_steps(num_rows: int, settings: TrainSettings) -> int:
    """Optimizer steps of a whole run."""
    return math.ceil(num_rows / settings.batch_size) * settings.epochs


def fit(
    model: PeftModel,
    tokenizer: Tokenizer,
    train: EncodedRows,
    valid: EncodedRows,
    settings: TrainSettings,
    observer: TrainObserver,
    work_dir: Path,
) -> tuple[EpochReport, ...]:
    """Train, and leave `model` with the weights of the best epoch, the last report whose `best` is true.

    Nothing is written to `work_dir`. Raises InvalidRequest when no epoch has a finite validation loss.
    """
    problem_type = settings.schema.problem_type
    watcher = _EpochWatcher(problem_type, observer)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return score(problem_type, np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

    trainer = Trainer(
        model=model,
        args=_arguments(settings, num_steps(len(train.features), settings), work_dir),
        train_dataset=train.features,  # pyright: ignore[reportArgumentType] - a list has all a Dataset needs
        eval_dataset=valid.features,  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=_logits_only,
        callbacks=[watcher],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    watcher.restore_best(model)
    return tuple(watcher.reports)


def _arguments(settings: TrainSettings, steps: int, work_dir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work_dir),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULERS[settings.schedule],
        warmup_steps=round(settings.warmup_ratio * steps),
        weight_decay=WEIGHT_DECAY,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(settings.batch_size, 32),
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def _logits_only(logits: Any, _labels: Any) -> Any:
    """Some models answer (logits, hidden states, …)."""
    return logits[0] if isinstance(logits, tuple) else logits


@dataclass
class _EpochWatcher(TrainerCallback):
    """Turns the Trainer's events into reports and keeps a copy of the best epoch's trainable weights."""

    problem_type: ProblemType
    observer: TrainObserver
    reports: list[EpochReport] = field(default_factory=list[EpochReport])
    train_loss: float = math.nan
    best_key: tuple[float, float] | None = None
    best_weights: dict[str, torch.Tensor] | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        del args, control, kwargs  # part of the callback's signature
        self.observer.on_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        del args, state, control, kwargs
        self.train_loss = float((logs or {}).get("loss", self.train_loss))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        del args, state, control, kwargs
        assert metrics is not None
        assert model is not None
        found = {name: float(metrics[f"eval_{name}"]) for name in _metric_names(self.problem_type)}
        loss = float(metrics[_LOSS])
        best = self._is_best(found, loss)
        if best:
            self.best_weights = trainable_state(model)
        report = EpochReport(len(self.reports) + 1, self.train_loss, loss, found, best)
        self.reports.append(report)
        self.observer.on_epoch(report)

    def _is_best(self, metrics: Mapping[str, float], loss: float) -> bool:
        name, more_is_better = SELECTION[self.problem_type]
        key = (metrics[name] if more_is_better else -metrics[name], -loss)
        if not math.isfinite(loss) or (self.best_key is not None and key <= self.best_key):
            return False
        self.best_key = key
        return True

    def restore_best(self, model: torch.nn.Module) -> None:
        if self.best_weights is None:
            raise InvalidRequest("learning_rate", "the loss was never finite: training diverged; lower it")
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.best_weights.items():
                parameters[name].copy_(value)


def _metric_names(problem_type: ProblemType) -> tuple[str, ...]:
    return ("mse", "mae", "pearson") if problem_type is ProblemType.REGRESSION else ("accuracy", "macro_f1")
