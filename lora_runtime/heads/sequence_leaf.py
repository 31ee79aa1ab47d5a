"""A head's norm, or another module without children, with each adapter's own parameters in one batch."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import nn
from torch.func import functional_call

from lora_runtime.batch import require_step


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has parameters and no children: what an adapter can change as a whole."""
    return not list(module.children()) and any(True for _ in module.parameters(recurse=False))


class SequenceLeaf(nn.Module):
    """The base's module, run again with the parameters of the adapters that bring some, on their rows."""

    def __init__(self, name: str, base: nn.Module) -> None:
        super().__init__()
        self._name = name
        self._base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, ...] → [N, ...]."""
        y = self._base(x)
        start = 0
        for resident, same in groupby(require_step().batch.rows, key=lambda row: row.resident):
            end = start + len(list(same))
            own = {key: resident.params.get(f"{self._name}.{key}") for key, _ in self._base.named_parameters()}
            brought = {key: value for key, value in own.items() if value is not None}
            if brought:
                y[start:end] = functional_call(self._base, brought, (x[start:end],))
            start = end
        return y
