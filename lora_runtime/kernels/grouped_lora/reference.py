r"""The mathematics, one segment and one site at a time, in any precision.

LoRA (Hu et al. 2021, arXiv:2106.09685) replaces a projection :math:`y = W x` by :math:`y = W x + s\, B A x` with
:math:`A \in R^{r \times d_{in}}`, :math:`B \in R^{d_{out} \times r}` and :math:`s = \alpha / r`. In a batch every
row has the A, B and s of its own adapter. Both are stored transposed (A `[d_in, r]`, B `[r, d_out]`), so with rows
`s:e` of adapter a:

    out[s:e] += scaling[a] * (x[s:e] @ A_a) @ B_a
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
            a, b, scaling = plan.slots.matrices(self._buffer, segment.slot, site)
            if not a.shape[1]:
                continue
            rows = slice(segment.start, segment.end)
            delta = scaling * (shrunk[rows] @ a.to(self._dtype)) @ b.to(self._dtype)  # [rows, d_out]
            out[rows] = (out[rows].to(self._dtype) + delta).to(out.dtype)
