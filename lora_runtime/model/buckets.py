"""Sizes that forward passes are captured for, and the tensors that the graphs of each size read their batch from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_runtime.batch import Batch, Row
from lora_runtime.kernels.grouped_lora.triton_backend.tiles import TileList
from lora_runtime.model.paged import PagedLayers, StaticDecodes
from lora_runtime.packing import PAD_SEQUENCE, InputBuffer, PackedLayout

_LEAST_TOKENS = 16  # of the smallest bucket
_LEAST_SEQUENCES = 16
_TOKENS_PER_SEQUENCE = 8  # a bucket has room for sequences as short as this; more of them take a larger bucket
_MAX_CONTEXT = 8192  # of a step that continues sequences: the list of their blocks is copied at every step


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """For which batches graphs are captured, and how much memory they may take."""

    num_bytes: int  # by which the memory that torch holds may grow
    buckets: tuple[int, ...]  # tokens, ascending
    max_sequences: int  # of a batch
    max_length: int  # tokens of a sequence
    decodes: tuple[int, ...] = ()  # sequences that continue by a token each, ascending

    @classmethod
    def usual(
        cls, num_bytes: int, token_budget: int, max_sequences: int, max_length: int, max_decodes: int = 0
    ) -> GraphSettings:
        """Buckets that double from 16 up to the token budget, and from 1 up to `max_decodes`."""
        buckets = _doubling(_LEAST_TOKENS, token_budget)
        decodes = _doubling(1, max_decodes) if max_decodes else ()
        return cls(num_bytes, buckets, max_sequences, max_length, decodes)


def _doubling(least: int, most: int) -> tuple[int, ...]:
    sizes = [least]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    if sizes[-1] < most:
        sizes.append(most)
    return tuple(sizes)


class Bucket:
    """The tensors that all graphs of one number of tokens read."""

    decodes: StaticDecodes | None = None

    def __init__(self, layout: PackedLayout, max_length: int, device: torch.device) -> None:
        """`max_length`: of a sequence."""
        self.layout = layout
        self.inputs = InputBuffer(layout, device)
        self._tiles: dict[int, TileList] = {}  # by the rank that they take
        views = self.inputs.inputs
        self.batch = Batch(
            rows=(),
            input_ids=views.input_ids,
            token_type_ids=views.token_type_ids,
            position_ids=views.position_ids,
            pad_ids=views.pad_ids,
            cu_seqlens=views.cu_seqlens,
            lengths=(),
            equal_runs=(),
            max_length=max_length,
        )

    @classmethod
    def of_sequences(cls, num_tokens: int, settings: GraphSettings, device: torch.device) -> Bucket:
        """For sequences that are all in the batch."""
        fillers = -(-num_tokens // PAD_SEQUENCE)
        room = max(_LEAST_SEQUENCES, num_tokens // _TOKENS_PER_SEQUENCE)
        layout = PackedLayout(num_tokens, min(room, settings.max_sequences + fillers))
        return cls(layout, max(min(num_tokens, settings.max_length), min(num_tokens, PAD_SEQUENCE)), device)

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether these rows, of the kind it is for, fit."""
        lengths = [row.sequence.num_tokens for row in rows]
        return self.layout.holds(sum(lengths), len(rows)) and max(lengths) <= self.batch.max_length

    def pack(self, rows: Sequence[Row], padding_idx: int | None) -> Batch:
        """The rows in its tensors."""
        return Batch.pack(rows, padding_idx=padding_idx, into=self.inputs)

    def tiles_for(self, rank: int, tile_rows: int) -> TileList:
        """The list of tiles of graphs for `rank`; each sequence may leave one of its tiles part empty."""
        if rank not in self._tiles:
            capacity = min(self.num_tokens, self.num_tokens // tile_rows + self.layout.num_sequences)
            self._tiles[rank] = TileList(capacity, tile_rows, self.batch.input_ids.device, max_rank=rank)
        return self._tiles[rank]

    def tiles(self, rank: int) -> TileList:
        """The list for `rank` that its graphs were captured with."""
        return self._tiles[rank]


class DecodeBucket(Bucket):
    """Of sequences that continue by one token each."""

    def __init__(self, num_rows: int, settings: GraphSettings, layers: PagedLayers, device: torch.device) -> None:
        super().__init__(PackedLayout(num_rows, num_rows), 1, device)
        self.decodes = StaticDecodes(layers, num_rows, min(settings.max_length, _MAX_CONTEXT))

    def holds(self, rows: Sequence[Row]) -> bool:
        """See Bucket."""
        assert self.decodes is not None
        return len(rows) <= self.num_tokens and self.decodes.holds(rows)

    def pack(self, rows: Sequence[Row], padding_idx: int | None) -> Batch:
        """See Bucket."""
        assert self.decodes is not None
        self.decodes.fill(rows)
        return super().pack(rows, padding_idx)
