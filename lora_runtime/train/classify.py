"""Fine-tuning of a text classifier: one LoRA adapter with its head, from files to a folder."""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from lora_runtime.adapters.metadata import AdapterMetadata
from lora_runtime.adapters.writing import staged_folder
from lora_runtime.errors import InvalidRequest
from lora_runtime.train.fitting import EncodedRows, encode, fit, num_steps
from lora_runtime.train.folder import write_adapter
from lora_runtime.train.metrics import baseline
from lora_runtime.train.settings import (
    EpochReport,
    SilentObserver,
    TrainObserver,
    TrainPlan,
    TrainReport,
    TrainSettings,
)
from lora_runtime.train.split import TrainingRows, load_rows
from lora_runtime.train.task_model import (
    TaskModel,
    add_lora,
    load_task_model,
    quiet_transformers,
    trainable_state,
)
from lora_runtime.types import Task


def train_classifier(settings: TrainSettings, observer: TrainObserver | None = None) -> TrainReport:
    """Train one adapter and write its folder: adapter_config.json, adapter_model.safetensors, multilora.json.

    The folder appears at once, with the weights of the best epoch, or not at all. The same settings, files,
    versions and number of threads give the same bytes. Raises TrainingDataInvalid, BaseModelUnsupported, or
    InvalidRequest whose field is that of `settings`.
    """
    observer = observer or SilentObserver()
    started = time.monotonic()
    schema = settings.schema
    with staged_folder(settings.out, overwrite=settings.overwrite) as folder:
        rows = load_rows(settings.train, settings.valid, schema, settings.valid_share, settings.seed)
        with quiet_transformers(), _reproducible(settings.seed, settings.threads):
            plan, epochs = _train(settings, rows, folder, observer)
    best = [report for report in epochs if report.best][-1]
    return TrainReport(settings.out, plan, epochs, best, time.monotonic() - started)


def _train(
    settings: TrainSettings, rows: TrainingRows, folder: Path, observer: TrainObserver
) -> tuple[TrainPlan, tuple[EpochReport, ...]]:
    task_model = load_task_model(settings, rows.labels)
    _check_max_length(settings, task_model)
    train = encode(rows.train, rows.labels, task_model.tokenizer, settings)
    valid = encode(rows.valid, rows.labels, task_model.tokenizer, settings)
    model, targets = add_lora(task_model, settings)
    plan = _plan(settings, rows, train, valid, targets, sum(v.numel() for v in trainable_state(model).values()))
    observer.on_start(plan)
    epochs = fit(model, task_model.tokenizer, train, valid, settings, observer, folder)
    best = [report for report in epochs if report.best][-1]
    write_adapter(folder, model, _metadata(settings, rows.labels, task_model, best))
    return plan, epochs


def _check_max_length(settings: TrainSettings, task_model: TaskModel) -> None:
    if settings.max_length > task_model.max_length:
        message = f"is {settings.max_length} tokens, the base allows {task_model.max_length}"
        raise InvalidRequest("max_length", message)


def _plan(
    settings: TrainSettings,
    rows: TrainingRows,
    train: EncodedRows,
    valid: EncodedRows,
    targets: tuple[str, ...],
    num_parameters: int,
) -> TrainPlan:
    problem_type = settings.schema.problem_type
    return TrainPlan(
        labels=rows.labels,
        problem_type=problem_type,
        num_train_rows=len(rows.train),
        num_valid_rows=len(rows.valid),
        num_truncated_rows=train.num_truncated + valid.num_truncated,
        num_steps=num_steps(len(rows.train), settings),
        num_parameters=num_parameters,
        target_modules=targets,
        baseline=baseline(problem_type, train.targets, valid.targets),
    )


def _metadata(
    settings: TrainSettings, labels: tuple[str, ...], task_model: TaskModel, best: EpochReport
) -> AdapterMetadata:
    return AdapterMetadata(
        task=Task.CLASSIFY,
        problem_type=settings.schema.problem_type,
        labels=labels,
        max_length=settings.max_length,
        pad_token_id=task_model.pad_token_id,
        base_model_name=settings.base_name or _name_of(settings.base),
        base=task_model.fingerprint,
        metrics={**best.metrics, "loss": best.valid_loss, "epoch": float(best.epoch)},
    )


def _name_of(base: str) -> str:
    """A hub name as it is; of a folder its last part, so that no path of this machine is published."""
    return Path(base).resolve().name if Path(base).is_dir() else base


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
