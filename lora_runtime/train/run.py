"""`train`: one LoRA adapter with its head, from files to a folder that the server loads."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from lora_runtime.adapters.metadata import AdapterMetadata
from lora_runtime.adapters.writing import staged_folder
from lora_runtime.errors import InvalidRequest
from lora_runtime.train.checkpoints import RunFolder, run_folder
from lora_runtime.train.fitting import Fitted, Fitting
from lora_runtime.train.folder import write_adapter
from lora_runtime.train.lora import add_lora, initialise_by_data, num_trainable
from lora_runtime.train.private.checks import check_private
from lora_runtime.train.processes import Process, device_of, this_process, wait_for_all
from lora_runtime.train.progress import SilentObserver, TrainObserver, TrainPlan, TrainReport
from lora_runtime.train.quantized import check_quantisation
from lora_runtime.train.report.write import write_report
from lora_runtime.train.reporting import run_report
from lora_runtime.train.settings import Init, TrainSettings
from lora_runtime.train.task_base import TaskBase, load_task_base, quiet_transformers
from lora_runtime.train.tasks import make_task
from lora_runtime.train.tasks.api import Encoded, TrainTask


def train(settings: TrainSettings, observer: TrainObserver | None = None) -> TrainReport:
    """Train one adapter and write its folder: adapter_config.json, adapter_model.safetensors, multilora.json, a report.

    The folder appears at once, with the weights of the best pass, or not at all. The same settings, files, versions
    and number of threads give the same bytes, unless training is private. Raises TrainingDataInvalid,
    BaseModelUnsupported, or InvalidRequest whose field is that of `settings`; what the observer raises passes through.
    """
    started = time.monotonic()
    process = this_process()
    if not process.is_first:
        observer = None
    device = device_of(settings.optim.device, process)
    check_quantisation(settings.optim.quantize, device)
    check_private(settings, process)
    _check_tensorboard(settings.run.tensorboard)
    run = settings.run
    staging = staged_folder(run.out, overwrite=run.overwrite) if process.is_first else nullcontext()
    with staging as folder, run_folder(run, is_first=process.is_first) as work:
        task = make_task(settings)
        with quiet_transformers(), _reproducible(run.seed, run.threads):
            one = _Run(settings, task, process, device, observer or SilentObserver(), work)
            plan, fitted = one.fit()
            if folder is not None:
                one.write(folder, plan, fitted, started)
    wait_for_all(process)  # the folder is there for each of them
    return TrainReport(
        run.out,
        plan,
        fitted.passes,
        fitted.best,
        fitted.step_losses,
        time.monotonic() - started,
        fitted.stopped_early,
        fitted.privacy,
    )


class _Run:
    """What one call of `train` does between its folders."""

    def __init__(
        self,
        settings: TrainSettings,
        task: TrainTask,
        process: Process,
        device: torch.device,
        observer: TrainObserver,
        work: RunFolder,
    ) -> None:
        self._settings = settings
        self._task = task
        self._process = process
        self._device = device
        self._observer = observer
        self._work = work
        self._base = load_task_base(settings, task.shape, device)
        _check_max_length(settings, self._base)
        self._encoded = task.encode(self._base)
        self._adapter = add_lora(self._base, task.shape, settings)

    def fit(self) -> tuple[TrainPlan, Fitted]:
        if self._process.is_first and self._work.keeps:
            self._work.begin(_identity(self._settings, self._encoded, self._process))
        if self._settings.lora.init is Init.EVA and self._work.checkpoint() is None:
            self._look_at_data()
        fitting = Fitting(
            self._settings,
            self._task,
            self._base,
            self._adapter,
            self._encoded,
            self._work,
            self._device,
            self._process,
            self._observer,
        )
        plan = self._plan(fitting)
        self._observer.on_start(plan)
        return plan, fitting.run()

    def write(self, folder: Path, plan: TrainPlan, fitted: Fitted, started: float) -> None:
        best = fitted.best
        metrics = {**best.metrics, "loss": best.valid_loss, "epoch": best.epoch}
        metadata = AdapterMetadata(
            task=self._task.kind,
            max_length=self._settings.data.max_length,
            pad_token_id=self._base.pad_token_id,
            base_model_name=self._settings.base_name,
            base=self._base.fingerprint,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},  # JSON has no others
            **self._task.metadata(self._base),
        )
        write_adapter(folder, self._adapter, metadata)
        if self._settings.run.report:
            seconds = time.monotonic() - started
            write_report(folder, run_report(self._settings, self._task, self._base, plan, fitted, seconds))

    def _look_at_data(self) -> None:
        """EVA's batches: the training rows once, in their order, without labels."""
        parts = self._parts(2 * self._settings.lora.rank)
        batches = [self._task.collate(self._base, rows) for rows in parts]
        if next(self._adapter.model.parameters()).device != self._device:  # a base in few bits is there already
            self._adapter.model.to(self._device)
        names = {"input_ids", "attention_mask", "token_type_ids"}
        initialise_by_data(self._adapter, [{name: batch[name] for name in names if name in batch} for batch in batches])

    def _parts(self, min_tokens: int) -> list[list[dict[str, Any]]]:
        """Training rows in batches of at least so many tokens; what is left over goes into the last."""
        parts: list[list[dict[str, Any]]] = [[]]
        num_tokens = 0
        for row in self._encoded.train.rows:
            if len(parts[-1]) >= self._settings.optim.batch_size and num_tokens >= min_tokens:
                parts.append([])
                num_tokens = 0
            parts[-1].append(row)
            num_tokens += self._task.num_tokens(row)
        if num_tokens < min_tokens:
            rest = parts.pop()
            if not parts:
                message = f"eva needs {min_tokens} tokens of training rows for this rank; there are {num_tokens}"
                raise InvalidRequest("init", f"{message}; lower the rank, or choose another beginning")
            parts[-1] += rest
        return parts

    def _plan(self, fitting: Fitting) -> TrainPlan:
        task, encoded = self._task, self._encoded
        num_train, num_valid = task.num_rows
        return TrainPlan(
            task=task.kind,
            labels=task.labels,
            problem_type=task.problem_type,
            num_train_rows=num_train,
            num_valid_rows=num_valid,
            num_truncated_rows=encoded.train.num_truncated + encoded.valid.num_truncated,
            num_skipped_rows=encoded.train.num_skipped + encoded.valid.num_skipped,
            num_steps=fitting.num_steps,
            num_parameters=num_trainable(self._adapter.model),
            target_modules=self._adapter.targets,
            baseline=fitting.baseline() if task.base_does_it else task.baseline(),
            baseline_of="the base alone" if task.base_does_it else "always the same answer",
            selection=task.selection[0],
            device=str(self._device),
            num_processes=self._process.count,
            privacy=fitting.privacy,
        )


def _check_max_length(settings: TrainSettings, base: TaskBase) -> None:
    if settings.data.max_length > base.max_length:
        message = f"is {settings.data.max_length} tokens, the base allows {base.max_length}"
        raise InvalidRequest("max_length", message)


def _check_tensorboard(folder: Path | None) -> None:
    if folder is not None and importlib.util.find_spec("tensorboard") is None:
        raise InvalidRequest("tensorboard", "needs the package of that name: pip install 'multilora[tensorboard]'")


def _identity(settings: TrainSettings, encoded: Encoded, process: Process) -> Mapping[str, str]:
    """What must agree for a run to go on: settings, rows as the model sees them, processes."""
    digest = hashlib.sha256()
    for side in (encoded.train, encoded.valid):
        for row in side.rows:
            digest.update(repr(sorted(row.items())).encode())
    return {**settings.decisive(), "rows": digest.hexdigest(), "processes": str(process.count)}


@contextmanager
def _reproducible(seed: int, threads: int | None) -> Generator[None]:
    """Seed every generator that training draws from, and give the caller's states back afterwards."""
    before = torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
