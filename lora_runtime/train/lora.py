"""The adapter around a base: PEFT's LoRA as the settings choose it, and its form on disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_runtime.errors import BaseModelUnsupported, InvalidRequest
from lora_runtime.train.settings import CHANGES_BASE, BaseBits, Init, LoraChoices, TrainSettings
from lora_runtime.train.task_base import TaskBase
from lora_runtime.train.tasks.api import TaskShape

_INIT: dict[Init, Any] = {Init.DEFAULT: True, Init.PISSA: "pissa", Init.OLORA: "olora", Init.EVA: "eva"}
MAX_EVA_PASSES, MIN_EVA_BATCHES = 20, 100  # of the training rows, until the directions must have settled
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A base with its adapter, both in one PEFT model."""

    model: PeftModel
    targets: tuple[str, ...]  # as they stand in adapter_config.json
    choices: LoraChoices
    beginning: dict[str, Tensor] | None  # A and B before training, where they were taken out of the base's weights

    def tensors(self) -> dict[str, Tensor]:
        """What adapter_model.safetensors holds: PEFT's names, on the host, for the base as its checkpoint has it.

        PiSSA and OLoRA took sB₀A₀ out of the base, so W + s(BA - B₀A₀) = W + s[B, -B₀][A; A₀]: twice the rank.
        """
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        tensors = {name: value.detach().cpu().float().contiguous() for name, value in state.items()}
        if self.beginning is None:
            return tensors
        for name, first in self.beginning.items():
            if name.endswith(_A):
                tensors[name] = torch.cat([tensors[name], first], dim=0)
            else:
                tensors[name] = torch.cat([tensors[name], -first], dim=1)
        return tensors

    def config(self) -> dict[str, Any]:
        """What adapter_config.json holds: plain LoRA, whose scaling is that of training."""
        values = {**self.model.peft_config["default"].to_dict(), "init_lora_weights": True, "eva_config": None}
        values["target_modules"] = sorted(self.targets)  # EVA has every site's own name in its place
        if self.beginning is not None:
            values["r"] = 2 * self.choices.rank
            grown = math.sqrt(2) if self.choices.rslora else 2
            values["lora_alpha"] = grown * self.choices.lora_alpha
        return values


def add_lora(base: TaskBase, shape: TaskShape, settings: TrainSettings) -> Adapter:
    """Wrap the targets. Raises InvalidRequest for targets that do not fit the base."""
    choices, model = settings.lora, base.model
    targets = choices.target_modules or layer_linears(model)
    transposed = check_targets(model, targets, base.trained_whole)
    _check_rank(model, targets, choices)
    if transposed and choices.init is Init.OLORA:
        message = f"olora begins from no transposed layers, as those of {type(model).__name__} are; choose pissa"
        raise InvalidRequest("init", message)
    config = LoraConfig(
        task_type=shape.peft_type,
        r=choices.rank,
        lora_alpha=cast(int, choices.lora_alpha),  # PEFT declares an int, and takes any number
        lora_dropout=choices.dropout,
        target_modules=list(targets),
        modules_to_save=[name for name in base.trained_whole if name not in shape.heads] or None,
        fan_in_fan_out=transposed,
        use_rslora=choices.rslora,
        use_dora=choices.dora,
        init_lora_weights=_INIT[choices.init],
        # every site keeps the rank that was asked for, instead of sharing ranks out by explained variance
        eva_config=EvaConfig(rho=1.0) if choices.init is Init.EVA else None,
    )
    if settings.optim.quantize is not BaseBits.NONE:
        model = _prepared_for_bits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
        wrapped = cast(PeftModel, get_peft_model(model, config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # heads too, whatever the base's precision
    beginning = _low_rank(wrapped) if choices.init in CHANGES_BASE else None
    return Adapter(wrapped, tuple(targets), choices, beginning)


def initialise_by_data(adapter: Adapter, batches: Sequence[dict[str, Tensor]]) -> None:
    """EVA: A becomes the principal directions of each site's inputs over `batches`, which have no labels.

    Each batch has more tokens than the rank. Raises InvalidRequest on `init` when the directions do not settle.
    """
    left = MAX_EVA_PASSES * len(batches) + MIN_EVA_BATCHES

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        nonlocal left
        if not left:  # PEFT would go round and round
            message = f"eva's directions did not settle in {MAX_EVA_PASSES} passes over the training rows"
            raise InvalidRequest("init", f"{message}; lower the rank, or choose another beginning")
        left -= 1
        model(**batch)

    initialize_lora_eva_weights(
        adapter.model,
        dataloader=batches,
        forward_fn=forward,
        gather_distributed_inputs=False,  # every process looks at all rows
        show_progress_bar=False,
    )


def _prepared_for_bits(model: PreTrainedModel) -> PreTrainedModel:
    from peft import prepare_model_for_kbit_training

    return cast(PreTrainedModel, prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))


def _low_rank(model: PeftModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().cpu().float().clone() for name, value in state.items() if name.endswith((_A, _B))}


def layer_linears(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths, inside one layer, of every attention and MLP linear of the backbone's layers.

    A layer is an entry of a module list, so its path has a number; poolers and heads have none.
    """
    tails: set[str] = set()
    for name, module in model.base_model.named_modules():
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if numbers and isinstance(module, (nn.Linear, Conv1D)):
            tails.add(".".join(parts[numbers[-1] + 1 :]))
    if not tails - {""}:
        raise BaseModelUnsupported(f"{type(model).__name__} has no linear layers to adapt; name target modules")
    return tuple(sorted(tails - {""}))


def _check_rank(model: PreTrainedModel, targets: Sequence[str], choices: LoraChoices) -> None:
    """A decomposition has no more directions than the narrower side of what is decomposed."""
    if choices.init is Init.DEFAULT:
        return
    for name, module in _matched(model, targets):
        if isinstance(module, Conv1D):
            d_in, d_out = (int(size) for size in module.weight.shape)
        else:
            d_in, d_out = int(getattr(module, "in_features", 0)), int(getattr(module, "out_features", 0))
        most = d_in if choices.init is Init.EVA else min(d_in, d_out)
        if choices.rank > most:
            raise InvalidRequest("rank", f"is {choices.rank}, and {choices.init} finds at most {most} at {name}")


def _matched(model: PreTrainedModel, targets: Sequence[str]) -> list[tuple[str, nn.Module]]:
    tails = tuple(f".{target}" for target in targets)
    return [(name, module) for name, module in model.named_modules() if f".{name}".endswith(tails)]


def check_targets(model: PreTrainedModel, targets: Sequence[str], trained_whole: Sequence[str]) -> bool:
    """Whether the targets are Conv1D; raises InvalidRequest for one that matches nothing, or the head."""
    kinds: set[bool] = set()
    for target in targets:
        matched = _matched(model, (target,))
        if not matched:
            raise InvalidRequest("target_modules", f"{target!r} matches no module of {type(model).__name__}")
        for name, module in matched:
            _check_target(target, name, module, trained_whole)
            kinds.add(isinstance(module, Conv1D))
    if len(kinds) > 1:
        raise InvalidRequest("target_modules", "name Conv1D and Linear layers together; choose one kind")
    return kinds == {True}


def _check_target(target: str, name: str, module: nn.Module, trained_whole: Iterable[str]) -> None:
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise InvalidRequest("target_modules", f"{target!r} matches {name}, which is not a linear layer")
    if any(f"{name}.".startswith(f"{whole}.") for whole in trained_whole):
        message = f"{target!r} matches {name}, which is trained in full; write a longer path"
        raise InvalidRequest("target_modules", message)


def num_trainable(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy, on the host, of the adapter's parameters: those that are trained, and A where it is frozen."""
    return {
        name: value.detach().cpu().clone()
        for name, value in model.named_parameters()
        if value.requires_grad or ".lora_" in name
    }


def restore_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model` the parameters of an `adapter_state`."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
