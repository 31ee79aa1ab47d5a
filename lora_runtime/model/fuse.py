"""Projections that share their input as one product on an accelerator: query, key and value; gate and up.

One launch instead of three, and a product that is wide enough to fill the device. No memory is taken: the weights
become slices of one.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from lora_runtime.model.prepack import hand_out, members_of_groups
from lora_runtime.model.wrapped import LoraLinear


def fuse_linears(backbone: nn.Module) -> list[LoraLinear]:
    """Fuse what can be: the plain linears of a site group, all with a bias or all without; returns those fused.

    Outputs are then slices, which not every architecture can view as it likes; see `unfuse_linears`.
    """
    able = [m for m in backbone.modules() if isinstance(m, LoraLinear) and type(m.base) is nn.Linear]
    fused: list[LoraLinear] = []
    for members in members_of_groups(able):
        linears = [member.base for member in members if isinstance(member.base, nn.Linear)]
        biases = {cast("torch.Tensor | None", linear.bias) is None for linear in linears}
        if len(linears) > 1 and len(biases) == 1:
            hand_out(_product(linears), members)
            fused += members
    return fused


def unfuse_linears(fused: list[LoraLinear]) -> None:
    """Have each multiply by itself again; its weight stays a slice."""
    for member in fused:
        member.prepacked = None


def _product(linears: list[nn.Linear]) -> partial[torch.Tensor]:
    """x [..., d_in] → [..., all d_out side by side]; the linears' parameters become slices of the product's."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [bias.detach() for linear in linears if (bias := cast("torch.Tensor | None", linear.bias)) is not None]
    bias = torch.cat(biases) if biases else None
    start = 0
    for linear in linears:
        end = start + linear.out_features
        linear.weight = nn.Parameter(weight[start:end], requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias[start:end], requires_grad=False)
        start = end
    return partial(F.linear, weight=weight, bias=bias)
