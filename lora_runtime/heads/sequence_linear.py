"""A head's linear layer, with each adapter's own parameters in one batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from lora_runtime.batch import Resident, Row, require_step, scale_and_shift
from lora_runtime.types import Site, SiteGroup


class SequenceLinear(nn.Module):
    """Applies, to each row's sequence, the adapter's weight and bias, else the base's, else nothing (zeros).

    The output is as wide as the widest adapter of the batch; narrower ones are zero beyond their own labels. A
    base layer that is a site (a pooler, lm_head) also adds its rows' low-rank deltas and extras.
    """

    def __init__(self, name: str, base: nn.Linear, from_base: bool) -> None:
        super().__init__()
        self._name = name
        self._base = base if from_base else None
        self._site: tuple[Site, SiteGroup] | None = None
        self._prepacked: Callable[[torch.Tensor], torch.Tensor] | None = None  # what the base's layer does, faster

    def prepack(self, make: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor] | None]) -> None:
        """Have a base's layer multiply by what `make` gives for it, where it gives something."""
        self._prepacked = None if self._base is None else make(self._base)

    def set_site(self, site: Site, group: SiteGroup) -> None:
        """Make the layer adaptable by LoRA."""
        self._site = site, group

    def own(self, resident: Resident) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(weight, bias) that an adapter brings for this layer, from its head or in place of the base's."""
        extras = resident.extras.get(self._name)
        replaced = {} if extras is None else extras.params
        weight = resident.params.get(f"{self._name}.weight", replaced.get("weight"))
        return weight, resident.params.get(f"{self._name}.bias", replaced.get("bias"))

    def width(self, resident: Resident) -> int:
        """How many outputs an adapter's rows have."""
        weight, _ = self.own(resident)
        if weight is not None:
            return weight.shape[0]
        return 0 if self._base is None else self._base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, ..., d_in] → [N, ..., widest d_out]."""
        segments = self._segments(require_step().batch.rows)
        y = self._from_base(x, max((self.width(resident) for *_, resident in segments), default=0))
        for start, end, resident in segments:
            weight, bias = self.own(resident)
            if self._base is not None:
                weight = self._base.weight if weight is None else weight
                bias = self._base.bias if bias is None else bias
            if weight is not None:
                y[start:end, ..., : weight.shape[0]] = F.linear(x[start:end], weight, bias)
        if self._site is not None:
            self._adapt(x, y, *self._site)
        return y

    def _segments(self, rows: tuple[Row, ...]) -> list[tuple[int, int, Resident]]:
        """(first row, end, adapter) of neighbours that share an adapter which brings this layer's parameters."""
        found: list[tuple[int, int, Resident]] = []
        start = 0
        for resident, same in groupby(rows, key=lambda row: row.resident):
            end = start + len(list(same))
            if any(part is not None for part in self.own(resident)):
                found.append((start, end, resident))
            start = end
        return found

    def _from_base(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """What the base answers, at least `width` wide."""
        if self._base is None:
            return x.new_zeros(*x.shape[:-1], width)
        y = self._base(x) if self._prepacked is None else self._prepacked(x)
        return F.pad(y, (0, width - y.shape[-1])) if width > y.shape[-1] else y

    def _adapt(self, x: torch.Tensor, y: torch.Tensor, site: Site, group: SiteGroup) -> None:
        step = require_step()
        rows = x.reshape(-1, x.shape[-1])
        owners = step.sequences(len(rows) // len(x))
        extras = owners.extras(self._name)
        flat = y.view(-1, y.shape[-1])
        for start, end, extra in extras:
            if extra.row_ids is not None and extra.rows is not None:  # trainable tokens of an output layer
                flat[start:end, extra.row_ids] = F.linear(rows[start:end], extra.rows)
        if owners.plan.active(group):
            out = flat if flat.shape[1] == site.d_out else flat[:, : site.d_out].contiguous()
            step.backend.expand(step.backend.shrink(rows, group, owners.plan), site, owners.plan, out)
            flat[:, : site.d_out] = out
        scale_and_shift(flat[:, : site.d_out], extras)
