"""What private training refuses, because its guarantee would not hold or could not be shown to."""

from __future__ import annotations

import importlib.util

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - of all batch norms

from lora_runtime.errors import BaseModelUnsupported, InvalidRequest
from lora_runtime.train.loss import CROSS_ENTROPY, FOCAL, LABEL_SMOOTHING
from lora_runtime.train.processes import Process
from lora_runtime.train.settings import BaseBits, Init, Optimizer, Precision, TrainSettings

_BY_ROW = (CROSS_ENTROPY, FOCAL, LABEL_SMOOTHING)


def check_private(settings: TrainSettings, process: Process) -> None:
    """Raise InvalidRequest, on the field that does not go with private training, before anything is read."""
    if settings.privacy is None:
        return
    if importlib.util.find_spec("opacus") is None:
        raise InvalidRequest("private", "training needs Opacus: pip install 'multilora[private]'")
    if process.count > 1:
        raise InvalidRequest("private", "training runs in one process; start it without torchrun")
    optim, lora = settings.optim, settings.lora
    refusals = (
        ("gradient_accumulation", optim.gradient_accumulation > 1, "1: a step's sample is drawn as a whole"),
        ("gradient_checkpointing", optim.gradient_checkpointing, "no: gradients of rows need the activations"),
        ("loss", optim.loss not in _BY_ROW, f"{', '.join(_BY_ROW)}: another may mix rows, or count their classes"),
        ("init", lora.init is Init.EVA, "one that looks at no training row"),
        ("dora", lora.dora, "no: there are no gradients of rows for its magnitudes"),
        ("optimizer", optim.optimizer is Optimizer.LORA_FA, "adamw or adam"),
        ("precision", optim.precision is not Precision.FP32, "fp32"),
        ("quantize", optim.quantize is not BaseBits.NONE, "none"),
    )
    for field, is_wrong, allowed in refusals:
        if is_wrong:
            raise InvalidRequest(field, f"is not for private training; allowed: {allowed}")


def check_private_model(model: nn.Module) -> None:
    """Raise BaseModelUnsupported where a row's gradient depends on the other rows of its batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            message = f"{name} normalises over the rows of a batch, so that no row's gradient is its own"
            raise BaseModelUnsupported(f"the base cannot be trained privately: {message}")
