r"""The mathematics, one segment and one site at a time, in any precision.

LoRA (Hu et al. 2021, arXiv:2106.09685) replaces a projection :math:`y = W x` by :math:`y = W x + s\, B A x` with
:math:`A \in R^{r \times d_{in}}`, :math:`B \in R^{d_{out} \times r}` and :math:`s = \alpha / r`. In a batch every
row has the A, B and s of its own adapter, so with rows `s:e` of adapter a, and B stored rank-major (`[r, d_out]`):

    out[s:e] += scaling[a] * (x[s:e] @ A_a.T) @ B_a
"""

from __future__ import annotations

import torch

from lora_runtime.arena import RankArena
from lora_runtime.kernels.grouped_lora.api import LoraPlan
from lora_runtime.types import Site, SiteGroup


class ReferenceGroupedLora:
    """The oracle of the other backends: slow, obvious, computed in `dtype` (float64 by default)."""

    def __init__(self, arena: RankArena, dtype: torch.dtype = torch.float64) -> None:
        self._buffer = arena.buffer
        self._dtype = dtype

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> torch.Tensor:
        """Keeps x: nothing is shared between sites here."""
        del group, plan
        return x.to(self._dtype)

    def expand(self, shrunk: torch.Tensor, site: Site, plan: LoraPlan, out: torch.Tensor) -> None:
        for segment in plan.segments:
            a_offset, b_offset, rank, scaling = plan.slots.entry(segment.slot, site.index)
            if not rank:
                continue
            a = self._buffer[a_offset : a_offset + rank * site.d_in].view(rank, site.d_in).to(self._dtype)
            b = self._buffer[b_offset : b_offset + rank * site.d_out].view(rank, site.d_out).to(self._dtype)
            rows = slice(segment.start, segment.end)
            delta = scaling * (shrunk[rows] @ a.T) @ b  # [rows, d_out]
            out[rows] = (out[rows].to(self._dtype) + delta).to(out.dtype)
