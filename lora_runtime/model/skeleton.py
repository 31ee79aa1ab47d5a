"""Task classes around a base that is in memory once: built without weights, given the base's own where it has them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lora_runtime.heads.task_head import NUM_SPAN_OUTPUTS, PAD, PROBE_LABELS
from lora_runtime.types import Task

AUTO_CLASSES: dict[Task, Any] = {
    Task.CLASSIFY: AutoModelForSequenceClassification,
    Task.CLASSIFY_TOKENS: AutoModelForTokenClassification,
    Task.ANSWER: AutoModelForQuestionAnswering,
    Task.GENERATE: AutoModelForCausalLM,
}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A task class whose backbone is the resident one. `missing` are parameters the base lacks, drawn at random."""

    task: Task
    model: Any
    prefix: str  # of the backbone inside the class
    missing: frozenset[str]
    backbone_children: frozenset[str]  # what the class's own backbone has: one task has a pooler, another none

    def drawn(self) -> dict[str, torch.Tensor]:
        """The parameters that an adapter would bring, by their names without the prefix; its labels in any case."""
        width = self.model.config.num_labels
        outputs = {
            f"{path}.{part}"
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == width and not path.startswith(f"{self.prefix}.")
            for part, _ in module.named_parameters()
        }
        names = self.missing if self.task is Task.GENERATE else self.missing | outputs
        return {name.removeprefix(f"{self.prefix}."): self.model.get_parameter(name) for name in names}


def has_class(task: Task, config: Any) -> bool:
    """Whether transformers has a class for the task on this architecture."""
    return type(config) in AUTO_CLASSES[task]._model_mapping  # pyright: ignore[reportPrivateUsage]


def is_decoder(config: Any) -> bool:
    """Whether the architecture predicts the next token, and is not an encoder that could be made to."""
    causal, masked = (auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMaskedLM))  # pyright: ignore
    return type(config) in causal and type(config) not in masked


def build_skeleton(task: Task, primary: Any, backbone: nn.Module, absent: set[str]) -> Skeleton:
    """The class of `task` around `backbone`; parameters outside it are `primary`'s unless in `absent`."""
    config = copy.deepcopy(primary.config)
    config.num_labels = NUM_SPAN_OUTPUTS if task is Task.ANSWER else PROBE_LABELS
    config.pad_token_id = PAD  # heads that pool by it are given ids of PAD and REAL alone
    with torch.device("meta"):
        model = AUTO_CLASSES[task].from_config(config)
    prefix = str(model.base_model_prefix)
    children = frozenset(name for name, _ in model.get_submodule(prefix).named_children())
    setattr(model, prefix, backbone)
    missing = {name for name, value in model.named_parameters() if value.is_meta}
    generator = torch.Generator().manual_seed(0)
    for name in sorted(missing):
        given = None if name in absent else _find(primary, name)
        shape = model.get_parameter(name).shape
        if given is not None and given.shape == shape:
            missing.discard(name)
        else:
            given = torch.randn(shape, generator=generator).mul_(0.1)
        _assign(model, name, given)
    if task is Task.GENERATE:
        model.tie_weights()
    return Skeleton(task, model.eval().requires_grad_(False), prefix, frozenset(missing), children)


def _find(primary: nn.Module, name: str) -> torch.Tensor | None:
    try:
        return primary.get_parameter(name)
    except AttributeError:
        return None


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))
