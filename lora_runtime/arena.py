"""Device memory for adapter images, and the table that says where each adapter's matrices lie in it.

`RankArena` is one buffer with a byte budget: an image takes one contiguous run of its true size, so there is no
maximum rank, no slot of a fixed size and no padding. `SlotTable` maps (slot, site) to offsets in that buffer.
Both belong to the engine thread; a loader writes only into a run that no slot points to yet.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from lora_runtime.errors import CapacityExceeded
from lora_runtime.types import Site, SiteGroup

ALIGNMENT = 16  # elements: 64 bytes in fp32, a cache line
BASE_SLOT = -1  # rows that no adapter touches
_PIECE = 1 << 18  # elements moved at a time: 1 MiB in fp32


def align(num_elements: int) -> int:
    """`num_elements` rounded up to the arena's alignment."""
    return -(-num_elements // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """A contiguous run of the arena, in elements."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class RankArena:
    """One buffer of `dtype` on `device`; runs are allocated best fit and coalesced when freed."""

    def __init__(
        self,
        num_bytes: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        pin_memory: bool = False,
    ) -> None:
        """`pin_memory`: page-locked, so that copies to an accelerator overlap with its work."""
        num_elements = num_bytes // dtype.itemsize // ALIGNMENT * ALIGNMENT
        if num_elements <= 0:
            raise CapacityExceeded(f"an arena of {num_bytes} bytes holds nothing; give it more", arena_bytes=num_bytes)
        try:  # [num_elements]; pages come when written
            self.buffer = torch.empty(num_elements, dtype=dtype, device=device, pin_memory=pin_memory)
        except RuntimeError as error:
            message = f"an arena of {num_bytes} bytes cannot be allocated on {device}; give it fewer"
            raise CapacityExceeded(message, arena_bytes=num_bytes) from error
        self._free: list[Run] = [Run(0, num_elements)]  # by offset
        self._used: dict[int, Run] = {}  # by offset
        self._num_used = 0  # elements

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.itemsize

    @property
    def num_fp32_bytes(self) -> int:
        """Bytes in float32 of what the arena holds in its dtype."""
        return self.buffer.numel() * torch.float32.itemsize

    @property
    def used_bytes(self) -> int:
        return self._num_used * self.buffer.itemsize

    @property
    def free_elements(self) -> int:
        """In all free runs together."""
        return self.buffer.numel() - self._num_used

    def can_allocate(self, num_elements: int) -> bool:
        """Whether one free run is long enough."""
        return any(run.length >= align(num_elements) for run in self._free)

    def allocate(self, num_elements: int) -> Run:
        """The shortest free run that fits; raises CapacityExceeded when none does."""
        length = align(max(num_elements, 1))
        fits = [run for run in self._free if run.length >= length]
        if not fits:
            raise CapacityExceeded(
                f"the arena has no free run of {length * self.buffer.itemsize} bytes "
                f"({self.used_bytes} of {self.num_bytes} are in use); unload adapters or give it more bytes",
                needed_bytes=length * self.buffer.itemsize,
                arena_bytes=self.num_bytes,
            )
        best = min(fits, key=lambda run: (run.length, run.offset))
        self._free.remove(best)
        if best.length > length:
            insort(self._free, Run(best.offset + length, best.length - length))
        run = Run(best.offset, length)
        self._used[run.offset] = run
        self._num_used += length
        return run

    def free(self, run: Run) -> None:
        """Give a run back; it must be one that `allocate` returned and that is not free already."""
        assert self._used.get(run.offset) == run, f"{run} is not in use"
        del self._used[run.offset]
        self._num_used -= run.length
        insort(self._free, run)
        at = self._free.index(run)
        for left in (at, at - 1):
            if 0 <= left < len(self._free) - 1 and self._free[left].end == self._free[left + 1].offset:
                right = self._free.pop(left + 1)
                self._free[left] = Run(self._free[left].offset, self._free[left].length + right.length)

    def plan_compaction(self, num_elements: int, fixed: Container[Run]) -> tuple[Run, ...] | None:
        """The runs to move down, in this order, so that `num_elements` fit in one run; None when that cannot be.

        Of all stretches of the buffer that hold enough free elements and no run of `fixed`, the one with the fewest
        elements to move.
        """
        needed = align(max(num_elements, 1))
        best: tuple[int, tuple[Run, ...]] | None = None
        for stretch in self._movable_stretches(fixed):
            first, num_free, num_moved = 0, 0, 0
            for last, run in enumerate(stretch):
                num_free, num_moved = self._counted(run, num_free, num_moved, 1)
                while num_free >= needed:
                    if best is None or num_moved < best[0]:
                        best = num_moved, tuple(r for r in stretch[first : last + 1] if r.offset in self._used)
                    num_free, num_moved = self._counted(stretch[first], num_free, num_moved, -1)
                    first += 1
        return None if best is None else best[1]

    def move_down(self, run: Run) -> Run:
        """Move a used run to the end of what precedes it, its content too; whoever points into it must be told."""
        before = next((free for free in self._free if free.end == run.offset), None)
        if before is None:
            return run
        moved = Run(before.offset, run.length)
        for start in range(0, run.length, _PIECE):  # through a piece of its own: the runs may overlap
            end = min(start + _PIECE, run.length)
            piece = self.buffer[run.offset + start : run.offset + end].clone()
            self.buffer[moved.offset + start : moved.offset + end].copy_(piece)
        if self.buffer.is_cuda:  # a loader may write where the run was, on a stream of its own
            torch.cuda.current_stream(self.buffer.device).synchronize()
        after = next((free for free in self._free if free.offset == run.end), Run(run.end, 0))
        self._free = [free for free in self._free if free not in (before, after)]
        insort(self._free, Run(moved.end, before.length + after.length))
        del self._used[run.offset]
        self._used[moved.offset] = moved
        return moved

    def _counted(self, run: Run, num_free: int, num_moved: int, sign: int) -> tuple[int, int]:
        if run.offset in self._used:
            return num_free, num_moved + sign * run.length
        return num_free + sign * run.length, num_moved

    def _movable_stretches(self, fixed: Container[Run]) -> Iterator[list[Run]]:
        stretch: list[Run] = []
        for run in sorted([*self._free, *self._used.values()]):
            if run in fixed:
                yield stretch
                stretch = []
            else:
                stretch.append(run)
        yield stretch

    def view(self, run: Run) -> torch.Tensor:
        """The run's elements, [length]."""
        return self.buffer[run.offset : run.end]

    def check_integrity(self) -> None:
        """Raise AssertionError unless free and used runs tile the buffer exactly and no two free ones touch."""
        cursor, last_free_end = 0, -1
        for run in sorted([*self._free, *self._used.values()]):
            assert run.length > 0, f"{run} is empty"
            assert run.offset == cursor, f"{run} leaves a hole or overlaps at {cursor}"
            cursor = run.end
            if run.offset not in self._used:
                assert run.offset != last_free_end, f"{run} was not coalesced with the free run before it"
                last_free_end = run.end
        assert cursor == self.buffer.numel(), f"runs end at {cursor}, the buffer at {self.buffer.numel()}"
        assert self._num_used == sum(run.length for run in self._used.values()), "used elements were miscounted"


class ALayout(StrEnum):
    """How the A of a group's sites, of R ranks together, lie: as the backend reads them fastest.

    Vector units of the CPU want what is multiplied by one element of x side by side: with MKL, products by columns are
    twice as fast at R 8 to 48. A GPU's wide loads want rows of a length that is known and aligned.
    """

    RANK_ROWS = "[R, d_in]"
    RANK_COLUMNS = "[d_in, R]"

    def place(self, column: int, d_in: int) -> int:
        """The first element of a site's A whose ranks begin at `column` of the group's."""
        return column if self is ALayout.RANK_COLUMNS else column * d_in

    def strides(self, group_rank: int, d_in: int) -> tuple[int, int]:
        """From one input to the next, and from one rank to the next."""
        return (group_rank, 1) if self is ALayout.RANK_COLUMNS else (1, d_in)


@dataclass(frozen=True, slots=True)
class SitePlacement:
    """Where one site's matrices lie, in elements from the start of the image (or arena, once published)."""

    site: int
    a_offset: int  # its ranks of the group's A, see ALayout
    b_offset: int  # B^T [rank, d_out], row-major
    rank: int
    scaling: float


class SlotTable:
    """`[slot, site] → (offset of A, offset of B, rank, scaling)`, changed only by publish and release.

    On the host the arrays are numpy; `a_offset`, `b_offset`, `rank` and `scaling` are the same memory as tensors, so
    that a kernel can read them. Each slot has a generation that grows when it is released: (slot, generation) names
    one adapter's stay and is never reused. `version` grows with every change, and `changed_at[slot]` is the version of
    the slot's last one, so that a copy elsewhere can be brought up to date by copying what changed.
    """

    def __init__(
        self,
        num_sites: int,
        groups: tuple[SiteGroup, ...],
        num_slots: int = 64,
        a_layout: ALayout = ALayout.RANK_COLUMNS,
    ) -> None:
        self.groups = groups
        self.a_layout = a_layout
        self._num_sites = num_sites
        self._free = list(range(num_slots - 1, -1, -1))
        self._published: dict[int, tuple[SitePlacement, ...]] = {}
        self._acquired: set[int] = set()
        self.version = 0
        self._grow_arrays(num_slots)

    @property
    def num_slots(self) -> int:
        return len(self.generation)

    def acquire(self) -> int:
        """A slot that points to nothing; the table doubles when none is free (only ever between two steps)."""
        if not self._free:
            old = self.num_slots
            self._grow_arrays(old * 2)
            self._free = list(range(old * 2 - 1, old - 1, -1))
        slot = self._free.pop()
        self._acquired.add(slot)
        return slot

    def publish(self, slot: int, run: Run, placements: tuple[SitePlacement, ...]) -> None:
        """Point `slot` at an image that is complete in `run`."""
        assert slot in self._acquired and slot not in self._published, f"slot {slot} is not open for publishing"
        for place in placements:
            self._a[slot, place.site] = run.offset + place.a_offset
            self._b[slot, place.site] = run.offset + place.b_offset
            self._rank[slot, place.site] = place.rank
            self._scaling[slot, place.site] = place.scaling
        for group in self.groups:
            ranks = [int(self._rank[slot, site.index]) for site in group.sites]
            self.group_rank[slot, group.index] = sum(ranks)
            starts = (self._a[slot, site.index] for site, rank in zip(group.sites, ranks, strict=True) if rank)
            self.group_a[slot, group.index] = next(starts, 0)
        self._published[slot] = placements
        self._note_change(slot)

    def move(self, slot: int, run: Run) -> None:
        """Point a published slot at its image's new place; its generation grows, so that no view of the old is used."""
        placements = self._published.pop(slot)
        self.generation[slot] += 1
        self.publish(slot, run, placements)

    def release(self, slot: int) -> None:
        """Forget what `slot` points to; its generation grows, so nothing cached for it can be used again."""
        assert slot in self._acquired, f"slot {slot} is not in use"
        self._published.pop(slot, None)
        self._rank[slot] = 0
        self._scaling[slot] = np.nan  # a stale read shows itself
        self.group_rank[slot] = 0
        self.generation[slot] += 1
        self._acquired.remove(slot)
        self._free.append(slot)
        self._note_change(slot)

    def entry(self, slot: int, site: int) -> tuple[int, int, int, float]:
        """(offset of A, offset of B, rank, scaling) of one site of one slot, offsets in arena elements."""
        at = slot, site
        return int(self._a[at]), int(self._b[at]), int(self._rank[at]), float(self._scaling[at])

    def matrices(self, buffer: torch.Tensor, slot: int, site: Site) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A^T [d_in, rank] and B^T [rank, d_out] as views of the arena's `buffer`, and the scaling."""
        a_offset, b_offset, rank, scaling = self.entry(slot, site.index)
        strides = self.a_layout.strides(int(self.group_rank[slot, site.group]), site.d_in)
        a = buffer.as_strided((site.d_in, rank), strides, a_offset)
        return a, buffer[b_offset : b_offset + rank * site.d_out].view(rank, site.d_out), scaling

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots are free or acquired, never both, and only published ones have ranks."""
        assert not self._acquired & set(self._free), "a slot is both free and acquired"
        assert len(self._acquired) + len(self._free) == self.num_slots, "a slot was lost"
        assert set(self._published) <= self._acquired, "a free slot is published"
        for slot in range(self.num_slots):
            if slot not in self._published:
                assert not self._rank[slot].any(), f"slot {slot} is not published but has ranks"

    def _note_change(self, slot: int) -> None:
        self.version += 1
        self.changed_at[slot] = self.version

    def _grow_arrays(self, num_slots: int) -> None:
        def grown(name: str, dtype: type, *shape: int) -> np.ndarray:
            array = np.zeros((num_slots, *shape), dtype=dtype)
            if (old := getattr(self, name, None)) is not None:
                array[: len(old)] = old
            return array

        self._a = grown("_a", np.int64, self._num_sites)
        self._b = grown("_b", np.int64, self._num_sites)
        self._rank = grown("_rank", np.int32, self._num_sites)
        self._scaling = grown("_scaling", np.float32, self._num_sites)
        self.group_rank = grown("group_rank", np.int32, len(self.groups))  # [slot, group]: sum over its sites
        self.group_a = grown("group_a", np.int64, len(self.groups))  # [slot, group]: offset of its A of all sites
        self.generation = grown("generation", np.int64)
        self.changed_at = grown("changed_at", np.int64)
        self.a_offset, self.b_offset = torch.from_numpy(self._a), torch.from_numpy(self._b)
        self.rank, self.scaling = torch.from_numpy(self._rank), torch.from_numpy(self._scaling)
