"""The flat list of tiles: which rows of a batch a program takes, and of which slot they are."""

from __future__ import annotations

import numpy as np
import torch

from lora_runtime.arena import BASE_SLOT, SlotTable
from lora_runtime.kernels.grouped_lora.api import LoraPlan, Segment
from lora_runtime.types import SiteGroup

TILES = "triton tiles"  # the plan's cache keeps the list under this key
MIN_WIDTH = 16  # of the scratch; a matrix product has at least 16 columns


class TileList:
    """At most `capacity` tiles of at most `tile_rows` rows, in one int32 buffer: count, then (slot, first row, rows).

    The buffer's address stays the same, so a graph that was captured with a list serves every batch that the list
    is filled from. `max_rank` is then the largest rank of a site that such a batch may have: it fixes the width of
    the scratch.
    """

    def __init__(self, capacity: int, tile_rows: int, device: torch.device, max_rank: int | None = None) -> None:
        """An empty list; `max_rank` None: of whatever is in the plan, for a list that serves one plan alone."""
        self.capacity = capacity
        self.tile_rows = tile_rows
        self.max_rank = max_rank
        self.num_tiles = 0
        self._segments: tuple[Segment, ...] = ()  # that it has the tiles of
        self.buffer = torch.zeros(1 + 3 * capacity, dtype=torch.int32, device=device)

    @classmethod
    def of(cls, plan: LoraPlan, tile_rows: int, device: torch.device) -> TileList:
        """The tiles of one plan, exactly as many."""
        tiles = cls(count_tiles(plan, tile_rows), tile_rows, device)
        tiles.fill(plan)
        return tiles

    def fits(self, plan: LoraPlan) -> bool:
        """Whether `fill` can take the plan: it has no more tiles and no larger rank than this list has room for."""
        if count_tiles(plan, self.tile_rows) > self.capacity:
            return False
        if self.max_rank is None or not plan.segments:
            return True
        return int(plan.slots.rank[[s.slot for s in plan.segments]].max()) <= self.max_rank

    def fill(self, plan: LoraPlan) -> None:
        """Replace the tiles by the plan's: one copy in the order of the current stream, without a wait.

        None where they are the same: texts that go on have those of the step before.
        """
        if plan.segments == self._segments:
            return
        assert self.fits(plan), f"a list of {self.capacity} tiles, rank {self.max_rank}, is too small for the plan"
        tiles = _cut(plan.segments, self.tile_rows)
        packed = torch.from_numpy(np.concatenate([[len(tiles)], tiles.ravel()]).astype(np.int32))
        if self.buffer.is_cuda:
            packed = packed.pin_memory()  # torch keeps its memory until the copy has been made
        self.buffer[: len(packed)].copy_(packed, non_blocking=True)
        self.num_tiles = len(tiles)
        self._segments = plan.segments

    def static_plan(self, slots: SlotTable, num_rows: int) -> LoraPlan:
        """A plan to capture a graph of `num_rows` rows with: it has the tiles that this list has when it is replayed.

        Every group counts as active, since a later batch may have adapters where the present one has none.
        """
        assert self.max_rank is not None, "a list for graphs needs a rank that it is made for"
        anybody = (Segment(BASE_SLOT, 0, num_rows, 0),)
        active = {("active", g.index): anybody for g in slots.groups}
        return LoraPlan(num_rows, (), slots, {TILES: self, "touched": [True] * len(slots.groups), **active})

    def width(self, group: SiteGroup, plan: LoraPlan) -> int:
        """Columns of the scratch: what the largest adapter of the group needs, rounded up to a power of two."""
        if self.max_rank is not None:
            return _padded(self.max_rank * len(group.sites))
        key = "triton width", group.index
        if key not in plan.cache:
            ranks = plan.slots.group_rank
            plan.cache[key] = _padded(max((int(ranks[s.slot, group.index]) for s in plan.segments), default=0))
        return plan.cache[key]


def count_tiles(plan: LoraPlan, tile_rows: int) -> int:
    """How many tiles of `tile_rows` rows the plan's segments are cut into."""
    return sum(-(-segment.num_rows // tile_rows) for segment in plan.segments)


def _cut(segments: tuple[Segment, ...], tile_rows: int) -> np.ndarray:
    """(slot, first row, rows) of each tile, [tiles, 3]."""
    table = np.array([(s.slot, s.start, s.end) for s in segments], dtype=np.int64).reshape(-1, 3)
    counts = -(-(table[:, 2] - table[:, 1]) // tile_rows)
    owner = np.repeat(np.arange(len(segments)), counts)
    step = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)  # of the tile in its segment
    first = table[owner, 1] + step * tile_rows
    return np.stack([table[owner, 0], first, np.minimum(tile_rows, table[owner, 2] - first)], axis=1)


def _padded(rank: int) -> int:
    return max(MIN_WIDTH, 1 << (rank - 1).bit_length()) if rank else MIN_WIDTH
