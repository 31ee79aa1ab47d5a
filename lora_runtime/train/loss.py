"""Losses by name, and those of the user's own module.

Every loss has one signature:

    loss(logits, targets, num_items) -> scalar

`logits` is [M, C] and `targets` is [M] of class indices, positions without a target already taken out. Multi-label
rows are logits [N, C] with targets [N, C] of 0 and 1; a regression's are [N] and [N]. `num_items` counts the targets
(of multi-label rows, entries) of the whole optimizer step, over accumulated passes and processes: a loss is a sum of
its terms divided by `num_items`, so that accumulation changes nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lora_runtime.errors import InvalidRequest, first_line

Loss = Callable[[Tensor, Tensor, "Tensor | int"], Tensor]
Counts = np.ndarray[Any, np.dtype[np.int64]]

FOCAL_GAMMA = 2.0  # of Lin et al. 2017
SMOOTHING = 0.1  # of Szegedy et al. 2016
CROSS_ENTROPY, FOCAL, LABEL_SMOOTHING, WEIGHTED = "cross-entropy", "focal", "label-smoothing", "weighted"
NAMES = (CROSS_ENTROPY, FOCAL, LABEL_SMOOTHING, WEIGHTED)


class TargetKind(StrEnum):
    """What a task's targets are."""

    CLASSES = "classes"  # one of a few classes that the training rows are counted by
    POSITIONS = "positions"  # a token of the text
    VOCABULARY = "vocabulary"  # the next token
    MULTI_LABEL = "multi-label"
    VALUES = "values"  # of a regression


_ALLOWED = {
    TargetKind.CLASSES: NAMES,
    TargetKind.MULTI_LABEL: NAMES,
    TargetKind.POSITIONS: (CROSS_ENTROPY, FOCAL),
    TargetKind.VOCABULARY: (CROSS_ENTROPY, FOCAL, LABEL_SMOOTHING),
    TargetKind.VALUES: (CROSS_ENTROPY,),
}


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How often each class is a target of the training rows: [C] counts of `num_rows` targets."""

    counts: Counts
    num_rows: int


def find_loss(name: str, kind: TargetKind) -> Loss | None:
    """Check a loss before anything is loaded: the function of `module:function`, None for one of NAMES.

    A module is looked for in the working directory too. Raises InvalidRequest on `loss`.
    """
    if ":" in name:
        return _own_function(name)
    if name not in NAMES:
        raise InvalidRequest("loss", f"{name!r} is not known; choose {', '.join(NAMES)} or module:function")
    if name not in _ALLOWED[kind]:
        allowed = ", ".join((*_ALLOWED[kind], "module:function"))
        raise InvalidRequest("loss", f"{name} does not suit a task whose targets are {kind}; choose {allowed}")
    return None


def named_loss(name: str, kind: TargetKind, counts: ClassCounts | None) -> Loss:
    """The loss of a name that `find_loss` let pass. `counts` is needed by `weighted` alone."""
    if kind is TargetKind.VALUES:
        return _squared_error
    if name == WEIGHTED:
        assert counts is not None, "tasks with counted classes give their counts"
        return _weighted(kind, counts)
    binary, classes = _BY_NAME[name]
    return binary if kind is TargetKind.MULTI_LABEL else classes


def _own_function(name: str) -> Loss:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything
        raise InvalidRequest("loss", f"module {module_name!r} cannot be imported: {first_line(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InvalidRequest("loss", f"module {module_name!r} has no function {function_name!r}")
    return _checked(name, cast(Loss, function))


def _checked(name: str, function: Loss) -> Loss:
    def call(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
        try:
            value = cast(Any, function(logits, targets, num_items))
        except Exception as error:  # the user's own code may raise anything
            shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
            raise InvalidRequest("loss", f"{name} failed on {shapes}: {first_line(error)}") from error
        if not isinstance(value, Tensor) or value.dim() != 0:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidRequest("loss", f"{name} returned {shown}; a scalar tensor is needed")
        return value

    return call


def _cross_entropy(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum") / num_items


def _binary(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / num_items


def _focal(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
    """Σ (1 - p)^γ · -log p, with p the probability of the target (Lin et al. 2017, without α)."""
    nll = functional.cross_entropy(logits.float(), targets, reduction="none")
    return ((1 - torch.exp(-nll)).clamp(min=0) ** FOCAL_GAMMA * nll).sum() / num_items


def _binary_focal(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
    nll = functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    return ((1 - torch.exp(-nll)).clamp(min=0) ** FOCAL_GAMMA * nll).sum() / num_items


def _smoothed(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
    summed = functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=SMOOTHING)
    return summed / num_items


def _binary_smoothed(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
    return _binary(logits, targets * (1 - SMOOTHING) + SMOOTHING / 2, num_items)


def _squared_error(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
    return functional.mse_loss(logits.float(), targets, reduction="sum") / num_items


def _weighted(kind: TargetKind, classes: ClassCounts) -> Loss:
    """Each class by rows / (classes · its rows), as scikit-learn's "balanced"; a positive label by its rarity."""
    counts = torch.as_tensor(np.maximum(classes.counts, 1), dtype=torch.float32)
    if kind is TargetKind.MULTI_LABEL:
        positive = (classes.num_rows - counts).clamp(min=1) / counts

        def binary(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
            weight = positive.to(logits.device)
            losses = functional.binary_cross_entropy_with_logits(
                logits.float(), targets, pos_weight=weight, reduction="sum"
            )
            return losses / num_items

        return binary
    balanced = classes.num_rows / (len(counts) * counts)

    def weighted(logits: Tensor, targets: Tensor, num_items: Tensor | int) -> Tensor:
        weight = balanced.to(logits.device)
        return functional.cross_entropy(logits.float(), targets, weight=weight, reduction="sum") / num_items

    return weighted


_BY_NAME: dict[str, tuple[Loss, Loss]] = {
    CROSS_ENTROPY: (_binary, _cross_entropy),
    FOCAL: (_binary_focal, _focal),
    LABEL_SMOOTHING: (_binary_smoothed, _smoothed),
}
