"""What updates the parameters, where the Trainer's own AdamW is not what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_runtime.train.lora import Adapter
from lora_runtime.train.settings import Optimisation, Optimizer, Schedule

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 1  # of the learning rate; passes without a lower loss that are let go
SCHEDULERS = {
    Schedule.LINEAR: "linear",
    Schedule.COSINE: "cosine",
    Schedule.CONSTANT: "constant_with_warmup",
    Schedule.REDUCE_ON_PLATEAU: "reduce_lr_on_plateau",
}


def make_optimizer(adapter: Adapter, optim: Optimisation) -> torch.optim.Optimizer | None:
    """None: the Trainer's AdamW, which decays neither biases nor norms. LoRA-FA freezes every A."""
    rate, decay = optim.learning_rate, optim.weight_decay
    if optim.optimizer is Optimizer.LORA_FA:
        alpha = cast(int, adapter.choices.lora_alpha)  # PEFT declares an int, and takes any number
        return create_lorafa_optimizer(adapter.model, adapter.choices.rank, alpha, rate, weight_decay=decay)
    kind = torch.optim.Adam if optim.optimizer is Optimizer.ADAM else torch.optim.AdamW
    if optim.loraplus_ratio is not None:
        return create_loraplus_optimizer(
            adapter.model, kind, lr=rate, loraplus_lr_ratio=optim.loraplus_ratio, loraplus_weight_decay=decay
        )
    if optim.optimizer is Optimizer.ADAMW:
        return None
    trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=rate)


class PlateauWarmUp(TrainerCallback):
    """A linear warm-up for reduce-on-plateau, which has none of its own: the rate of step i is i / `num_steps` of it.

    `rates` are those of the optimizer's groups at their peak.
    """

    def __init__(self, num_steps: int, rates: Sequence[float]) -> None:
        self._num_steps = num_steps
        self._rates = rates

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, control
        if self._num_steps and state.global_step <= self._num_steps:
            share = state.global_step / self._num_steps
            for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
                group["lr"] = rate * share
