"""The training loop: transformers' Trainer over one task, watched, resumable, with the best pass kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import TrainerCallback

from lora_runtime.train.checkpoints import RunFolder
from lora_runtime.train.lora import Adapter, adapter_state, restore_state
from lora_runtime.train.optimizers import (
    SCHEDULERS,
    PlateauWarmUp,
    make_optimizer,
)
from lora_runtime.train.private.accounting import plan_privacy, spent_privacy
from lora_runtime.train.private.settings import PrivacyBudget
from lora_runtime.train.private.trainer import PrivateSteps
from lora_runtime.train.processes import Process
from lora_runtime.train.progress import EvalReport, TrainObserver
from lora_runtime.train.settings import Precision, Schedule, TrainSettings
from lora_runtime.train.task_base import TaskBase
from lora_runtime.train.tasks.api import Array, Batch, Encoded, TrainTask
from lora_runtime.train.watcher import OTHERS, Watcher

_WEIGHTS_FILE = "adapter_state.safetensors"  # of a checkpoint


@dataclass(frozen=True, slots=True)
class Fitted:
    """A run's end: the model has the weights of `best`."""

    passes: tuple[EvalReport, ...]
    best: EvalReport
    step_losses: tuple[float, ...]
    predictions: tuple[Array, Array]  # of the best pass, and the labels of its rows
    stopped_early: bool
    privacy: PrivacyBudget | None  # of the steps taken


def steps_per_epoch(num_rows: int, settings: TrainSettings, process: Process) -> int:
    """Optimizer steps of one pass over the training rows."""
    optim = settings.optim
    return math.ceil(math.ceil(num_rows / (optim.batch_size * process.count)) / optim.gradient_accumulation)


class Fitting:
    """One run's Trainer. Made before training, so that a plan can say what will be trained."""

    def __init__(
        self,
        settings: TrainSettings,
        task: TrainTask,
        base: TaskBase,
        adapter: Adapter,
        encoded: Encoded,
        folder: RunFolder,
        device: torch.device,
        process: Process,
        observer: TrainObserver,
    ) -> None:
        self._settings = settings
        self._model = adapter.model
        self._folder = folder
        epoch = steps_per_epoch(len(encoded.train.rows), settings, process)
        self.num_steps = epoch * settings.optim.epochs
        self._watcher = Watcher(
            observer,
            task.selection,
            epoch,
            lambda model: task.sample(model, base),
            settings.optim.patience,
            folder.keeps,
        )

        def collate(rows: list[dict[str, Any]]) -> Batch:
            return task.collate(base, rows)

        kind = _TaskTrainer if settings.privacy is None else _PrivateTrainer
        self._trainer = kind(
            task,
            self._watcher,
            model=adapter.model,
            args=_arguments(settings, self.num_steps, folder, device, process, task.eval_rows_at_once),
            train_dataset=encoded.train.rows,
            eval_dataset=encoded.valid.rows,
            data_collator=collate,
            compute_metrics=self._score,
            callbacks=_callbacks(settings, process, self._watcher),
            optimizers=(make_optimizer(adapter, settings.optim), None),
        )
        self.privacy = None
        if isinstance(self._trainer, _PrivateTrainer) and settings.privacy is not None:
            self.privacy = plan_privacy(settings.privacy, len(encoded.train.rows), epoch, settings.optim.epochs)
            self._trainer.make_private(self.privacy)
        self._task = task
        self._base = base
        self._valid: Any = encoded.valid.rows  # a list has all that the Trainer asks of a data set
        self._trainer.remove_callback(PrinterCallback)
        if settings.optim.schedule is Schedule.REDUCE_ON_PLATEAU:
            groups = self._trainer.create_optimizer().param_groups
            warmup = round(settings.optim.warmup_ratio * self.num_steps)
            self._trainer.add_callback(PlateauWarmUp(warmup, [group["lr"] for group in groups]))

    def baseline(self) -> dict[str, float]:
        """Metrics of the base alone, before training: every B is zero, or takes back what was taken out of the base."""
        with torch.random.fork_rng():
            found = self._trainer.predict(self._valid, metric_key_prefix="base").metrics or {}
            metrics = {name.removeprefix("base_"): float(value) for name, value in found.items()}
            return {name: metrics[name] for name in metrics if name not in OTHERS} | self._task.sample(
                self._model, self._base
            )

    def run(self) -> Fitted:
        """Train, and leave the model with the weights of the best pass.

        Raises InvalidRequest when no pass has a finite validation loss, KeyboardInterrupt after a last checkpoint.
        """
        checkpoint = self._folder.checkpoint()
        if checkpoint is not None:
            self._watcher.resume(checkpoint)
        self._trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        watcher = self._watcher
        best = watcher.restore_best(self._model)
        if watcher.best_predictions is None:  # the best pass was before the interruption
            self._trainer.predict(self._valid)
            watcher.best_predictions = watcher.last_predictions
        assert watcher.best_predictions is not None
        history = watcher.history
        spent = None if self.privacy is None else spent_privacy(self.privacy, len(history.step_losses))
        passes, losses = tuple(history.passes), tuple(history.step_losses)
        return Fitted(passes, best, losses, watcher.best_predictions, watcher.stopped_early, spent)

    def _score(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        self._watcher.last_predictions = (predictions, labels)
        return self._task.score(predictions, labels)


class _TaskTrainer(Trainer):
    """The Trainer with the task's forward pass and loss, and checkpoints of the adapter's parameters alone."""

    loss_is_scaled_for_ga = True  # every loss is a sum over the step's number of targets

    def __init__(self, task: TrainTask, watcher: Watcher, **options: Any) -> None:
        # the function makes the Trainer count a step's targets, over accumulated passes and processes
        super().__init__(compute_loss_func=task.loss, **options)
        self._task = task
        self._watcher = watcher

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the Trainer's own, with what the task makes of a batch in place of a model's outputs."""
        batch = dict(inputs)
        labels = batch.pop("labels")
        logits = self._task.logits(model, batch)
        count = int((labels != -100).sum()) if num_items_in_batch is None else num_items_in_batch
        loss = self._task.loss(logits, labels, count)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over them, targets were summed
        if return_outputs:
            return loss, {"predictions": self._task.predict(logits, labels)}
        self._watcher.add_loss(loss.detach())
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer counts the model's parameters for it in every step, and nobody reads it."""
        del inputs
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        del state_dict
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter_state(self._bare), folder / _WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model
        restore_state(self._bare, load_file(Path(resume_from_checkpoint) / _WEIGHTS_FILE))

    @property
    def _bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)


class _PrivateTrainer(PrivateSteps, _TaskTrainer):
    """The task's, with private steps."""


def _arguments(
    settings: TrainSettings, steps: int, folder: RunFolder, device: torch.device, process: Process, eval_rows: int
) -> TrainingArguments:
    optim, on_cpu = settings.optim, device.type == "cpu"
    every = "epoch" if optim.eval_steps is None else "steps"
    arguments = TrainingArguments(  # gradient checkpointing is the base's: see `task_base.py`
        output_dir=str(folder.path),
        learning_rate=optim.learning_rate,
        lr_scheduler_type=SCHEDULERS[optim.schedule],
        warmup_steps=round(optim.warmup_ratio * steps),
        weight_decay=optim.weight_decay,
        num_train_epochs=optim.epochs,
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=max(optim.batch_size, eval_rows),
        gradient_accumulation_steps=optim.gradient_accumulation,
        bf16=optim.precision is Precision.BF16,
        eval_strategy=every,
        logging_strategy=every,
        save_strategy=every if folder.keeps else "no",
        eval_steps=optim.eval_steps,
        save_steps=optim.eval_steps or 500,
        save_total_limit=2,  # while one is written, another is whole
        metric_for_best_model="loss",  # what reduce-on-plateau looks at
        seed=settings.run.seed,
        data_seed=settings.run.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and process.count > 1 else None,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    # several devices are for several processes: DataParallel would take them all for one
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    return arguments


def _callbacks(settings: TrainSettings, process: Process, watcher: Watcher) -> list[TrainerCallback]:
    if settings.run.tensorboard is None or not process.is_first:
        return [watcher]
    from torch.utils.tensorboard import SummaryWriter

    return [watcher, TensorBoardCallback(SummaryWriter(str(settings.run.tensorboard)))]
