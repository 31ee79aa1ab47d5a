"""The task class that PEFT wraps, without weights, and where a checkpoint has each of its parameters.

A checkpoint of a bare backbone, of this task's class or of another's all name the backbone's tensors differently. The
names are matched by transformers' own rules of loading, which know prefixes and renamed modules of every architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from lora_runtime.errors import CheckpointRejected, InvalidRequest, first_line
from lora_runtime.heads.sequence_leaf import is_leaf
from lora_runtime.model.skeleton import AUTO_CLASSES, is_decoder
from lora_runtime.svd.model_folder import CONFIG_FILE, ModelFolder, Stored
from lora_runtime.types import Task

_CLASSES: dict[Task, Any] = {**AUTO_CLASSES, Task.EMBED: AutoModel}


def task_of(folder: ModelFolder) -> Task:
    """The task of the class that the model was saved from; raises CheckpointRejected for one that is not served."""
    config = folder.config
    named = str((getattr(config, "architectures", None) or ["nothing"])[0])
    for task in _CLASSES:
        if task is Task.GENERATE and not is_decoder(config):
            continue
        if named in _class_names(task, config):
            return task
    where = f"{folder.role} {folder.path / CONFIG_FILE} field architectures"
    raise CheckpointRejected(where, f"names {named}, a class of none of the tasks; give the task")


def _class_names(task: Task, config: Any) -> list[str]:
    mapping = _CLASSES[task]._model_mapping  # pyright: ignore[reportPrivateUsage]
    found: Any = mapping.get(type(config), None)
    classes: Iterable[Any] = found if isinstance(found, (list, tuple)) else () if found is None else (found,)
    return [kind.__name__ for kind in classes]


@dataclass(frozen=True)
class TaskClass:
    """One checkpoint seen as the class of a task; the model has no weights."""

    folder: ModelFolder
    task: Task
    model: PreTrainedModel

    @classmethod
    def of(cls, folder: ModelFolder, task: Task) -> TaskClass:
        """Raises InvalidRequest for a task that the architecture has no class for, CheckpointRejected for a config."""
        config = folder.config
        if config.is_encoder_decoder:
            raise CheckpointRejected(f"{folder.role} {folder.path}", "is an encoder-decoder, which is not served yet")
        if not _class_names(task, config) or (task is Task.GENERATE and not is_decoder(config)):
            raise InvalidRequest("task", f"transformers has no class to {task} with {config.model_type}")
        try:
            with torch.device("meta"):
                model = _CLASSES[task].from_config(config)
        except Exception as error:
            message = f"cannot be built ({first_line(error)})"
            raise CheckpointRejected(f"{folder.role} {folder.path / CONFIG_FILE}", message) from error
        return cls(folder, task, model)

    @cached_property
    def prefix(self) -> str:
        """The backbone's path in the class; empty where the class is the backbone."""
        return "" if self.model.base_model is self.model else str(self.model.base_model_prefix)

    @cached_property
    def output(self) -> str:
        """The path of the layer over the vocabulary; empty for a task without one."""
        if self.task is not Task.GENERATE:
            return ""
        layer = self.model.get_output_embeddings()
        return next((path for path, module in self.model.named_modules() if module is layer), "")

    @cached_property
    def word_embedding(self) -> str:
        """The path of the module that embeds token ids."""
        words = self.model.get_input_embeddings()
        return next((path for path, module in self.model.named_modules() if module is words), "")

    @cached_property
    def leaves(self) -> dict[str, nn.Module]:
        """Modules with parameters and no children, which an adapter can change, by path."""
        return {path: m for path, m in self.model.named_modules(remove_duplicate=False) if is_leaf(m)}

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name, tied ones under all their names."""
        return {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Where the checkpoint has each parameter that it has; a tied one is where the other is."""
        found = {name: stored for name, stored in self._named.items() if name in self.parameters}
        tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        for target, source in tied.items():
            first = found.get(source, found.get(target))
            if first is not None:
                found[source] = found[target] = first
        return found

    @cached_property
    def unplaced(self) -> Mapping[str, Stored]:
        """Floating tensors of the checkpoint that are no parameter of the class, by the name they would have."""
        return {n: stored for n, stored in self._named.items() if n not in self.parameters and stored.is_floating}

    @cached_property
    def _named(self) -> dict[str, Stored]:
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        state = self.model.state_dict()
        named: dict[str, Stored] = {}
        for key, stored in self.folder.tensors.items():
            name, converted = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            name = name if converted is None else key  # fused with others at load: never one parameter by itself
            if name in named:
                self.folder.reject(stored, f"and tensor {named[name].key} are both {name} of the class")
            named[name] = stored
        return named

    def read(self, name: str) -> torch.Tensor:
        """A parameter, or a tensor that has no place in the class, by its name; see `ModelFolder.read`."""
        return self.folder.read(self.stored.get(name) or self.unplaced[name])

    def is_conv1d(self, path: str) -> bool:
        """Whether the module keeps its weight as [d_in, d_out]."""
        return isinstance(self.leaves.get(path), Conv1D)

    def inside(self, name: str) -> bool:
        """Whether a path is of the backbone."""
        return name.startswith(f"{self.prefix}.") if self.prefix else True

    def is_pooler(self, name: str) -> bool:
        """Whether a path is of a top-level pooler of the backbone, which many checkpoints lack."""
        return self.inside(name) and name.removeprefix(f"{self.prefix}.").split(".", 1)[0] == "pooler"
