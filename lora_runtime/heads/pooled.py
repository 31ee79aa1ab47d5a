"""Embeddings: the hidden states of each sequence as one vector. No parameters, hence no head of an adapter's own."""

from __future__ import annotations

import torch

from lora_runtime.adapters.base_spec import HeadSpec
from lora_runtime.batch import Row, Step
from lora_runtime.types import Pooling, Site, SiteGroup, Task


class PooledHead:
    """Means, first or last tokens; `default` is the pooling of rows that name none."""

    pads = False

    def __init__(self, default: Pooling) -> None:
        self.spec = HeadSpec(Task.EMBED, {}, frozenset(), frozenset(), output="")
        self._default = default

    def set_sites(self, sites: tuple[Site, ...], groups: tuple[SiteGroup, ...]) -> None:
        """A pooled head has no layers to adapt."""

    def run(self, step: Step, hidden: torch.Tensor) -> list[torch.Tensor]:
        """hidden [T, d] of the step's batch → [d] per row; means are summed in fp32."""
        ends = step.batch.cu_seqlens.long()
        lengths = ends[1:] - ends[:-1]
        pooled: dict[Pooling, torch.Tensor] = {}  # [N, d] each, as they are asked for
        return [self._pool(self._of(row), hidden, ends, lengths, pooled)[i] for i, row in enumerate(step.batch.rows)]

    def _of(self, row: Row) -> Pooling:
        return row.pooling or row.resident.card.pooling or self._default

    def _pool(
        self,
        pooling: Pooling,
        hidden: torch.Tensor,
        ends: torch.Tensor,
        lengths: torch.Tensor,
        pooled: dict[Pooling, torch.Tensor],
    ) -> torch.Tensor:
        if pooling not in pooled:
            if pooling is Pooling.MEAN:
                pooled[pooling] = torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0, unsafe=True)
            else:
                pooled[pooling] = hidden.index_select(0, ends[:-1] if pooling is Pooling.CLS else ends[1:] - 1)
        return pooled[pooling]
