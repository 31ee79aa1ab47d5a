"""Attention of sequences that continue: a step's rows over the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn

from lora_runtime.batch import CachedRow, Row
from lora_runtime.kv_blocks import BlockCopy
from lora_runtime.model.kv_cache import KvCache
from lora_runtime.model.kv_layouts import PagedSpans, Scoring, SequenceSpan, StepMetadata
from lora_runtime.types import TokenSequence

_WARM_UP_CONTEXTS = (64, 256, 512, 1024, 2048)  # our kernel splits the keys of each in another way


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

    def warm_up_rows(self, max_length: int) -> list[Row]:
        """Rows that each need other kernels than the rest, to be run alone: they touch the spare block at most."""
        spare = self.cache.spare_block
        if spare is None or self.cache.device.type != "cuda":
            return []
        contexts = [n for n in _WARM_UP_CONTEXTS if n <= max_length] or [max_length]
        blocks = [[spare] * -(-context // self.cache.block_tokens) for context in contexts]
        return [
            Row(TokenSequence((0,) * count, None), cached=CachedRow(context - count, own))
            for context, own in zip(contexts, blocks, strict=True)
            for count in (1, 2)
        ]

    def step(self, rows: Sequence[Row]) -> PagedStep | None:
        """For the rows that continue, the first ones of a batch; None where there are none."""
        found = [(row.cached, row.sequence.num_tokens) for row in rows if row.cached is not None]
        return PagedStep(self, found) if found else None


class PagedStep:
    """One step's `PagedAttention`."""

    def __init__(self, layers: PagedLayers, rows: Sequence[tuple[CachedRow, int]]) -> None:
        """`rows`: each with the number of its tokens."""
        self.num_tokens = sum(count for _, count in rows)
        self._layers = layers
        self._rows = rows

    @cached_property
    def _metadata(self) -> StepMetadata:
        """Made by the first layer: a step that is replayed has none that asks."""
        spans = [SequenceSpan(count, row.start + count, row.blocks) for row, count in self._rows]
        return self._layers.cache.metadata(spans)

    @cached_property
    def _slots(self) -> torch.Tensor:
        """[t]"""
        cache = self._layers.cache
        slots = [_slots(row, count, cache.block_tokens) for row, count in self._rows]
        return torch.from_numpy(np.concatenate(slots)).to(cache.device, non_blocking=True)

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


class StaticDecodes:
    """`PagedAttention` of sequences of one token each that tensors say where they lie, whose addresses stay.

    A step that is captured with it serves every batch that it is filled from. Rows beyond the batch's store and see
    one token of the cache's spare block.
    """

    def __init__(self, layers: PagedLayers, num_rows: int, max_context: int) -> None:
        """For contexts of at most `max_context` tokens."""
        cache = layers.cache
        assert cache.spare_block is not None, "only what one call attends over can be captured"
        self.num_tokens = num_rows
        self.num_columns = -(-max_context // cache.block_tokens)
        self._layers = layers
        self._sizes = [num_rows, num_rows + 1, num_rows * self.num_columns]
        self._buffer = torch.empty(num_rows + (sum(self._sizes) + 1) // 2, dtype=torch.int64, device=cache.device)
        self._slots, used, contexts, blocks = self._parts(self._buffer)
        self._spans = PagedSpans(
            queries=torch.arange(num_rows + 1, dtype=torch.int32, device=cache.device),
            contexts=contexts,
            used=used,
            blocks=blocks.view(num_rows, self.num_columns),
            max_queries=1,
            max_context=self.num_columns * cache.block_tokens,
        )
        self.fill(())

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether the contexts of the rows, all of which continue by one token, are short enough."""
        return all(row.cached is not None and len(row.cached.blocks) <= self.num_columns for row in rows)

    def fill(self, rows: Sequence[Row]) -> None:
        """Replace the content, in the order of the current stream, without a wait."""
        cache, num_rows = self._layers.cache, self.num_tokens
        assert cache.spare_block is not None
        host = torch.zeros(len(self._buffer), dtype=torch.int64, pin_memory=cache.device.type == "cuda")
        slots, used, contexts, blocks = (part.numpy() for part in self._parts(host))
        slots[:], used[:] = cache.spare_block * cache.block_tokens, 1
        blocks[:] = cache.spare_block
        table = blocks.reshape(num_rows, self.num_columns)
        for at, row in enumerate(rows):
            one = row.cached
            assert one is not None and row.sequence.num_tokens == 1
            used[at] = one.start + 1
            table[at, : len(one.blocks)] = one.blocks
            slots[at] = _slots(one, 1, cache.block_tokens)[0]
        used.cumsum(out=contexts[1:])
        self._buffer.copy_(host, non_blocking=True)

    def _parts(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Slots [n] int64, and as int32: used [n], contexts [n + 1], blocks [n * columns]."""
        slots, rest = buffer[: self.num_tokens], buffer[self.num_tokens :].view(torch.int32)
        return [slots, *rest[: sum(self._sizes)].split(self._sizes)]

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
        """See `batch.PagedAttention`. Raises RuntimeError for what only gathers can do."""
        cache, layer = self._layers.cache, self._layers.layer(module)
        if not cache.can_attend_paged(softcap):
            raise RuntimeError("attention with a softcap over the KV cache has launches that differ from step to step")
        cache.write(layer, k, v, self._slots)
        scoring = Scoring(q.shape[2] ** -0.5 if scale is None else scale, window, softcap)
        return cache.attend_paged(layer, q, self._spans, scoring)


def _slots(row: CachedRow, count: int, block_tokens: int) -> np.ndarray:
    """Where the keys and values of a row's tokens lie, [count] int64."""
    if count == 1:
        block, offset = divmod(row.start, block_tokens)
        return np.array([row.blocks[block] * block_tokens + offset])
    positions = np.arange(row.start, row.start + count)
    blocks = np.asarray(row.blocks, dtype=np.int64)
    return blocks[positions // block_tokens] * block_tokens + positions % block_tokens
