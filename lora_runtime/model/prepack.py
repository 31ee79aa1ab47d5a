"""The base's projections with their weights in the order that oneDNN multiplies fastest.

Measured on AVX2 with 2 threads in fp32, from 384 x 384 to 768 x 3072: 1.1 to 1.2 times as fast with 2,048 rows, 1.1 to
1.4 with 256, 1.1 to 2.6 with 16; slower only at 384 x 384 with one row. The operators are those that torch's compiler
uses for frozen weights.

With AVX-512 and 2 threads, the projections of a 135M decoder took 1.3 times as long as plain ones with 1 or 2 rows,
which therefore stay plain (`FEW_ROWS`), and 0.3 to 0.45 times with 16; its output layer of 49,152 tokens 0.9 and 0.3.

oneDNN compiles a product for each number of rows that it meets. torch and oneDNN both keep 1,024 of them, some 0.5 MB
each: here 32, unless the environment says otherwise. A step needs one for each shape of projection.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_runtime.model.wrapped import Adapt, LoraLinear

Product = Callable[[torch.Tensor], torch.Tensor]

for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
    os.environ.setdefault(_variable, "32")

_log = logging.getLogger(__name__)
FEW_ROWS = 2
_PROBE_ROWS = 3
_TOLERANCE = 1e-4  # of a projection of random numbers, relative to the largest


def prepack_linears(backbone: nn.Module, *, together: bool = True) -> int:
    """Have each projection multiply by a reordered copy of its weight; the bytes of the copies.

    `together`: those of a site group, which share their input (query, key and value; gate and up), are one product,
    whose columns they share out: measured 1.5 to 1.9 times as fast with 1 to 30 rows of 384, 1.1 with 256. Their
    outputs are then slices, which not every architecture can view as it likes.

    The weights themselves stay, for adapters that change them. Projections that oneDNN does not multiply as exactly,
    all of them where torch is built without it, stay as they are.
    """
    num_bytes = 0
    refused: list[str] = []
    able = [m for m in backbone.modules() if isinstance(m, LoraLinear) and _weight(m.base) is not None]
    for module in able:
        module.few_rows = FEW_ROWS
    for members in members_of_groups(able, together=together):
        linears = [module.base for module in members]
        product = _prepacked(linears)
        if product is None and len(members) > 1:
            refused += [module.path for module in members if not _prepack_alone(module)]
        elif product is None:
            refused.append(members[0].path)
        else:
            hand_out(product, members)
        num_bytes += sum(4 * m.site.d_in * m.site.d_out for m in members if m.prepacked is not None)
    if refused:
        _log.warning("%d projections are not prepacked and may be slower: %s …", len(refused), refused[0])
    return num_bytes


def prepack_output(linear: nn.Module) -> Product | None:
    """The product of an output layer with a reordered copy of its weight; None where oneDNN does not multiply it as
    exactly, or the layer is of another class than is known here."""
    return _prepacked([linear]) if _weight(linear) is not None else None


def members_of_groups(able: Sequence[LoraLinear], *, together: bool = True) -> list[list[LoraLinear]]:
    """These projections, those of one group beside each other where all of the group is among them."""
    found: dict[object, list[LoraLinear]] = {}
    for module in able:
        found.setdefault(module.group.index if together else module, []).append(module)
    members: list[list[LoraLinear]] = []
    for modules in found.values():
        ordered = sorted(modules, key=lambda module: module.site.index)
        whole = [module.site for module in ordered] == list(modules[0].group.sites)
        members += [ordered] if whole else [[module] for module in ordered]
    return members


class _Alone:
    """The product of one projection, which adds its own deltas."""

    def __init__(self, product: Product) -> None:
        self._product = product

    def part(self, x: torch.Tensor, adapt: Adapt) -> tuple[torch.Tensor, bool]:
        """x [..., d_in] → ([..., d_out], False)."""
        del adapt
        return self._product(x), False


class _Together:
    """One product of several projections, computed when one of them is asked and kept until each took its part.

    A part is handed out once: who takes it adds an adapter's delta to it in place.
    """

    def __init__(self, product: Product, widths: list[int]) -> None:
        self._product = product
        self._widths = widths
        self._x: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}  # by place, those that are left
        self._is_adapted = False

    def part(self, place: int, x: torch.Tensor, adapt: Adapt) -> tuple[torch.Tensor, bool]:
        """x [..., d_in] → [..., width of that place], a slice, and whether it has its deltas already.

        `adapt` is given the outputs of all, side by side, before the first is handed out.
        """
        if self._x is not x or place not in self._parts:
            whole = self._product(x)
            self._is_adapted = adapt(x, whole)
            self._x, self._parts = x, dict(enumerate(whole.split(self._widths, dim=-1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._x = None
        return part, self._is_adapted


def hand_out(product: Product, members: list[LoraLinear]) -> None:
    """Have each of them take its columns of x → the outputs of all, side by side."""
    if len(members) == 1:
        members[0].prepacked = _Alone(product).part
        return
    shared = _Together(product, [module.site.d_out for module in members])
    for place, module in enumerate(members):
        module.prepacked = partial(shared.part, place)


def _weight(linear: nn.Module) -> torch.Tensor | None:
    """[d_out, d_in] in fp32, of the classes whose product is known here."""
    if type(linear) not in (nn.Linear, Conv1D):
        return None
    weight: Any = linear.weight
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return None
    return weight.detach().t().contiguous() if isinstance(linear, Conv1D) else weight.detach()


def _prepack_alone(module: LoraLinear) -> bool:
    product = _prepacked([module.base])
    if product is not None:
        module.prepacked = _Alone(product).part
    return product is not None


def _prepacked(linears: list[nn.Module]) -> Product | None:
    """x → the outputs of all, side by side; None where the operators are not there or not exact."""
    try:
        weight = torch.cat([w for linear in linears if (w := _weight(linear)) is not None])
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        product = _product(packed, _biases(linears))
        x = torch.randn(1, _PROBE_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
        wanted, found = torch.cat([linear(x) for linear in linears], dim=-1), product(x)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        _log.debug("oneDNN: %s", error)
        return None
    exact = torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE * max(1.0, float(wanted.abs().max())))
    return product if exact and found.is_contiguous() else None


def _biases(linears: list[nn.Module]) -> torch.Tensor | None:
    """Of all, side by side; zeros for those without one beside others."""
    biases: list[Any] = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    weights = [_weight(linear) for linear in linears]
    return torch.cat(
        [
            w.new_zeros(len(w)) if b is None else b.detach()
            for w, b in zip(weights, biases, strict=True)
            if w is not None
        ]
    )


def _product(packed: torch.Tensor, bias: torch.Tensor | None) -> Product:
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, "none", [], "")
