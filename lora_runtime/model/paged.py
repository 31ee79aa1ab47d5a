"""Attention of sequences that continue: a step's rows over the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lora_runtime.batch import CachedRow, Row
from lora_runtime.kv_blocks import BlockCopy
from lora_runtime.model.kv_cache import KvCache
from lora_runtime.model.kv_layouts import SequenceSpan


class PagedLayers:
    """A KV cache, and which of its layers each attention module of a base has: they are numbered as they are called."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self._layers: dict[int, int] = {}  # by id of the module

    def layer(self, module: nn.Module) -> int:
        """The module's layer."""
        return self._layers.setdefault(id(module), len(self._layers))

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, before anything is written."""
        self.cache.copy(copies)

    def step(self, rows: Sequence[Row]) -> PagedStep | None:
        """For the rows that continue, the first ones of a batch; None where there are none."""
        found = [(row.cached, row.sequence.num_tokens) for row in rows if row.cached is not None]
        return PagedStep(self, found) if found else None


class PagedStep:
    """One step's `PagedAttention`."""

    def __init__(self, layers: PagedLayers, rows: Sequence[tuple[CachedRow, int]]) -> None:
        """`rows`: each with the number of its tokens."""
        cache = layers.cache
        self.num_tokens = sum(count for _, count in rows)
        self._layers = layers
        self._metadata = cache.metadata([SequenceSpan(count, row.start + count, row.blocks) for row, count in rows])
        slots = [_slots(row, count, cache.block_tokens) for row, count in rows]
        self._slots = torch.from_numpy(np.concatenate(slots)).to(cache.device, non_blocking=True)  # [t]

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See `batch.PagedAttention`."""
        cache, layer = self._layers.cache, self._layers.layer(module)
        cache.write(layer, k, v, self._slots)
        return cache.attend(layer, q, self._metadata, scale=scale, window=window, softcap=softcap)


def _slots(row: CachedRow, count: int, block_tokens: int) -> np.ndarray:
    """Where the keys and values of a row's tokens lie, [count] int64."""
    if count == 1:
        block, offset = divmod(row.start, block_tokens)
        return np.array([row.blocks[block] * block_tokens + offset])
    positions = np.arange(row.start, row.start + count)
    blocks = np.asarray(row.blocks, dtype=np.int64)
    return blocks[positions // block_tokens] * block_tokens + positions % block_tokens
