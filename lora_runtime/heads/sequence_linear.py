"""A head's linear layer, with each adapter's own parameters in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from lora_runtime.batch import Row, require_step
from lora_runtime.types import Site, SiteGroup


class SequenceLinear(nn.Module):
    """Applies, to each row's sequence, the adapter's weight and bias, else the base's, else nothing (zeros).

    The output is as wide as the widest adapter of the batch; narrower ones are zero beyond their own labels. A
    base layer that is a site (a pooler) also adds its rows' low-rank deltas.
    """

    def __init__(self, name: str, base: nn.Linear, from_base: bool) -> None:
        super().__init__()
        self._name = name
        self._base = base if from_base else None
        self._site: tuple[Site, SiteGroup] | None = None

    def set_site(self, site: Site, group: SiteGroup) -> None:
        """Make the layer adaptable by LoRA."""
        self._site = site, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, ..., d_in] → [N, ..., widest d_out]."""
        step = require_step()
        segments = _segments(step.batch.rows, self._name)
        y = self._base(x) if self._base is not None else _zeros(x, segments, f"{self._name}.weight")
        for start, end, params in segments:
            weight = params.get(f"{self._name}.weight")
            bias = params.get(f"{self._name}.bias")
            if self._base is not None:
                weight = self._base.weight if weight is None else weight
                bias = self._base.bias if bias is None else bias
            if weight is not None:
                y[start:end, ..., : weight.shape[0]] = F.linear(x[start:end], weight, bias)
        if self._site is not None:
            self._add_deltas(x, y)
        return y

    def _add_deltas(self, x: torch.Tensor, y: torch.Tensor) -> None:
        assert self._site is not None
        site, group = self._site
        step = require_step()
        rows = x.reshape(-1, x.shape[-1])
        plan = step.sequence_plan(len(rows) // len(x))
        if plan.active(group):
            step.backend.expand(step.backend.shrink(rows, group, plan), site, plan, y.view(-1, y.shape[-1]))


def _segments(rows: tuple[Row, ...], name: str) -> list[tuple[int, int, Mapping[str, torch.Tensor]]]:
    """(first row, last, parameters) of neighbours that share an adapter which brings this layer's parameters."""
    found: list[tuple[int, int, Mapping[str, torch.Tensor]]] = []
    start = 0
    for _, same in groupby(rows, key=lambda row: id(row.params)):
        members = list(same)
        if any(key.rpartition(".")[0] == name for key in members[0].params):
            found.append((start, start + len(members), members[0].params))
        start += len(members)
    return found


def _zeros(
    x: torch.Tensor, segments: list[tuple[int, int, Mapping[str, torch.Tensor]]], weight_name: str
) -> torch.Tensor:
    width = max((params[weight_name].shape[0] for *_, params in segments), default=0)
    return x.new_zeros(*x.shape[:-1], width)
