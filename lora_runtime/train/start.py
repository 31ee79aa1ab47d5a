"""Going on from an adapter that was trained before, on other rows: its parameters in place of fresh ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.folder import WEIGHTS_FILE
from lora_runtime.adapters.metadata import AdapterMetadata, read_json_object, read_metadata
from lora_runtime.errors import AdapterRejected, InvalidRequest
from lora_runtime.train.lora import Adapter
from lora_runtime.train.task_base import TaskBase
from lora_runtime.train.tasks.api import TrainTask

# What the numbers mean depends on these; dropout and the like may change from run to run.
_FORM = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern")


def start_from(folder: Path, adapter: Adapter, task: TrainTask, base: TaskBase) -> None:
    """Give `adapter` the parameters of `folder`, which a run of the same task, base and form has written.

    Raises InvalidRequest of the field start_from, with what differs, where it was not.
    """
    try:
        metadata, config = read_metadata(folder), read_json_object(folder / CONFIG_FILE)
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError, AdapterRejected) as error:
        raise _refused(folder, f"cannot be read ({error})") from error
    if metadata is None:
        raise _refused(folder, "has no multilora.json, so its base and labels are unknown")
    _check_metadata(folder, metadata, task, base)
    _check_form(folder, config, adapter.config())
    own = adapter.tensors()
    _check_tensors(folder, tensors, own)
    set_peft_model_state_dict(adapter.model, tensors)


def _check_metadata(folder: Path, metadata: AdapterMetadata, task: TrainTask, base: TaskBase) -> None:
    if metadata.task is not task.kind:
        raise _refused(folder, f"is an adapter of the task {metadata.task}, this run is of {task.kind}")
    if metadata.base is not None and metadata.base != base.fingerprint:
        raise _refused(folder, "was trained on another base")
    if metadata.labels is not None and metadata.labels != task.labels:
        mine, theirs = (", ".join(labels) for labels in (task.labels, metadata.labels))
        raise _refused(folder, f"has the labels {theirs}; the rows have {mine}")


def _check_form(folder: Path, config: Mapping[str, object], own: Mapping[str, object]) -> None:
    for name in _FORM:
        theirs, mine = config.get(name), own.get(name)
        if theirs != mine:
            raise _refused(folder, f"has {name} {_shown(theirs)}, this run {_shown(mine)}; give it the same choices")


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if different := sorted(tensors.keys() ^ own.keys()):
        raise _refused(folder, f"does not hold the same tensors as this run, {different[0]} for one")
    for name, value in own.items():
        if tensors[name].shape != value.shape:
            shapes = f"{tuple(tensors[name].shape)}, this run {tuple(value.shape)}"
            raise _refused(folder, f"has {name} of shape {shapes}")


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _refused(folder: Path, problem: str) -> InvalidRequest:
    return InvalidRequest("start_from", f"{folder} {problem}")
