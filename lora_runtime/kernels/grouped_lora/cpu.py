"""The CPU backend for a torch without MKL (else see `mkl.py`): long segments in a loop over views of the arena, short
ones in one batched product.

Two GEMMs per segment are the least arithmetic, but each call costs microseconds; below `SHORT_ROWS` rows that
cost dominates, so short segments are padded to equal length and multiplied by a stack of their matrices. The
stack is a copy: it is kept until the set of adapters changes, one per group and rank class. Stacks have a budget of
their own; segments whose stack finds no room in it are looped.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.kernels.grouped_lora.api import LoraPlan, Segment
from lora_runtime.types import Site, SiteGroup

SHORT_ROWS = 4  # segments below this many rows are batched
SMALL_PRODUCT = 1 << 17  # multiply-adds under which a second thread does not pay (two cores, d 384, measured)
MIN_BATCHED = 4  # fewer short segments than this are not worth a stack
MAX_VIEWS = 1 << 15  # kept, of (slot, group); each is a few tensor objects on the arena's memory
STALE_TURNS = 16  # plans without a use; a step has a few plans


@dataclass(frozen=True, slots=True)
class _GroupViews:
    """One slot's matrices at one group, as views of the arena."""

    generation: int
    a_t: torch.Tensor  # [d_in, R]: every A of the group, transposed
    sites: dict[int, tuple[int, int, torch.Tensor, float]]  # site → (first column of R, last, B [r, d_out], scaling)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The matrices of n slots at one group, padded with zeros to the widest of them."""

    key: tuple[tuple[int, int], ...]  # (slot, generation) in order
    a_t: torch.Tensor  # [n, d_in, R]
    b: dict[int, torch.Tensor]  # site → [n, R, d_out], rows of other sites are zero, scaling multiplied in
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Loop:
    """Segments taken one by one; `sizes` cuts all rows at their borders, in one call instead of one for each."""

    segments: tuple[Segment, ...]
    sizes: tuple[int, ...]
    picks: tuple[int, ...]  # which of the cut pieces are segments
    mean_rows: float

    @classmethod
    def over(cls, segments: tuple[Segment, ...], num_rows: int) -> _Loop:
        sizes: list[int] = []
        picks: list[int] = []
        cursor = 0
        for segment in segments:
            if segment.start > cursor:
                sizes.append(segment.start - cursor)
            picks.append(len(sizes))
            sizes.append(segment.num_rows)
            cursor = segment.end
        mean_rows = sum(segment.num_rows for segment in segments) / max(len(segments), 1)
        return cls(segments, (*sizes, num_rows - cursor), tuple(picks), mean_rows)

    def rows_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each segment's rows of x, as views."""
        pieces = x.split_with_sizes(self.sizes)
        return [pieces[i] for i in self.picks]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Short segments of one rank class, padded to one length."""

    segments: tuple[Segment, ...]
    rank_class: int
    length: int
    gather: torch.Tensor | None  # [n * length] rows of x; None when the segments are one gapless equal run
    rows: torch.Tensor | None  # rows of out that are real
    real: torch.Tensor | None  # their places among n * length

    @property
    def key(self) -> tuple[tuple[int, int], ...]:
        return tuple((s.slot, s.generation) for s in self.segments)


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """`x A^T` of every active segment: looped ones [rows, R], tiles [n, length, R]."""

    loop: _Loop
    views: list[_GroupViews]
    looped: list[torch.Tensor]
    mean_site_rank: float
    tiled: list[tuple[_Tile, _Stack, torch.Tensor]]


class CpuGroupedLora:
    """Bound to one arena and slot table; accumulates in fp32."""

    def __init__(self, arena: RankArena, slots: SlotTable, stack_bytes: int = 32 << 20) -> None:
        self._buffer = arena.buffer
        self._slots = slots
        self._views: dict[tuple[int, int], _GroupViews] = {}  # (slot, group)
        self._stacks = StackCache(stack_bytes)

    @property
    def cached_bytes(self) -> int:
        """Of the stacks."""
        return self._stacks.used_bytes

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> _Shrunk:
        self._stacks.next_plan(plan)
        loop, tiles = self._split(group, plan)
        stacks = [stack for tile in tiles if (stack := self._stack(tile, group)) is not None]
        if len(stacks) < len(tiles):
            loop, tiles, stacks = self._looped(group, plan), (), []
        views = [self._group_views(segment, group) for segment in loop.segments]
        ranks = sum(view.a_t.shape[1] for view in views) / max(len(views), 1)
        with _threads_for(loop.mean_rows * ranks * group.d_in):
            looped = [torch.mm(rows, view.a_t) for rows, view in zip(loop.rows_of(x), views, strict=True)]
        tiled: list[tuple[_Tile, _Stack, torch.Tensor]] = []
        for tile, stack in zip(tiles, stacks, strict=True):
            tiled.append((tile, stack, torch.bmm(_gathered(x, tile), stack.a_t)))
        return _Shrunk(loop, views, looped, ranks / len(group.sites), tiled)

    def expand(self, shrunk: _Shrunk, site: Site, plan: LoraPlan, out: torch.Tensor) -> None:
        del plan
        with _threads_for(shrunk.loop.mean_rows * shrunk.mean_site_rank * site.d_out):
            for rows, view, h in zip(shrunk.loop.rows_of(out), shrunk.views, shrunk.looped, strict=True):
                if (place := view.sites.get(site.index)) is not None:
                    first, last, b, scaling = place
                    rows.addmm_(h if last - first == h.shape[1] else h[:, first:last], b, alpha=scaling)
        for tile, stack, h in shrunk.tiled:
            if (b := stack.b.get(site.index)) is not None:
                _scatter_add(out, tile, h, b)

    def _split(self, group: SiteGroup, plan: LoraPlan) -> tuple[_Loop, tuple[_Tile, ...]]:
        """Which segments are looped and which are tiled; groups with the same active adapters share the answer."""
        active = plan.active(group)
        ranks = tuple(int(self._slots.group_rank[s.slot, group.index]) for s in active)
        key = "split", active, tuple(map(_rank_class, ranks))
        if key not in plan.cache:
            looped, tiles = _split(active, key[2])
            plan.cache[key] = _Loop.over(looped, plan.num_rows), tiles
        return plan.cache[key]

    def _looped(self, group: SiteGroup, plan: LoraPlan) -> _Loop:
        active = plan.active(group)
        key = "looped", active
        if key not in plan.cache:
            plan.cache[key] = _Loop.over(active, plan.num_rows)
        return plan.cache[key]

    def _group_views(self, segment: Segment, group: SiteGroup) -> _GroupViews:
        key = segment.slot, group.index
        views = self._views.get(key)
        if views is None or views.generation != segment.generation:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            views = self._views[key] = self._make_views(segment, group)
        return views

    def _make_views(self, segment: Segment, group: SiteGroup) -> _GroupViews:
        sites: dict[int, tuple[int, int, torch.Tensor, float]] = {}
        column, start = 0, None
        for site in group.sites:
            a_offset, _, rank, _ = self._slots.entry(segment.slot, site.index)
            if not rank:
                continue
            start = a_offset if start is None else start
            assert a_offset == start + column, "the A columns of a group are not adjacent"
            _, b, scaling = self._slots.matrices(self._buffer, segment.slot, site)
            sites[site.index] = column, column + rank, b, scaling
            column += rank
        assert start is not None, "a segment without a matrix in the group is not active"
        a_t = self._buffer[start : start + column * group.d_in].view(group.d_in, column)
        return _GroupViews(segment.generation, a_t, sites)

    def _stack(self, tile: _Tile, group: SiteGroup) -> _Stack | None:
        """None where there is no room for it."""
        place = group.index, tile.rank_class
        stack = self._stacks.find(place, tile.key)
        if stack is None:
            views = [self._group_views(segment, group) for segment in tile.segments]
            width = max(view.a_t.shape[1] for view in views)
            outputs = {index: b.shape[1] for view in views for index, (_, _, b, _) in view.sites.items()}
            num_bytes = len(views) * width * (group.d_in + sum(outputs.values())) * self._buffer.itemsize
            if not self._stacks.make_room(place, num_bytes):
                return None
            stack = self._make_stack(tile, group, views, width, num_bytes)
            self._stacks.put(place, stack)
        return stack

    def _make_stack(
        self, tile: _Tile, group: SiteGroup, views: list[_GroupViews], width: int, num_bytes: int
    ) -> _Stack:
        n = len(views)
        a_t = self._buffer.new_zeros(n, group.d_in, width)
        b: dict[int, torch.Tensor] = {}
        for i, view in enumerate(views):
            a_t[i, :, : view.a_t.shape[1]] = view.a_t
            for index, (first, last, matrix, scaling) in view.sites.items():
                if index not in b:
                    b[index] = self._buffer.new_zeros(n, width, matrix.shape[1])
                torch.mul(matrix, scaling, out=b[index][i, first:last])
        return _Stack(tile.key, a_t, b, num_bytes)


class StackCache:
    """Stacks by (group, rank class) within a budget. Those that recent plans used are not dropped for others:

    a step uses every group's in turn, so the least recently used one would always be the next that is needed.
    """

    def __init__(self, max_bytes: int) -> None:
        self.used_bytes = 0
        self._max_bytes = max_bytes
        self._stacks: dict[tuple[int, int], tuple[_Stack, int]] = {}  # with the turn of their last use
        self._turn = 0
        self._plan: LoraPlan | None = None

    def next_plan(self, plan: LoraPlan) -> None:
        """Begin a turn, unless `plan` is the one before."""
        if plan is not self._plan:
            self._plan = plan
            self._turn += 1

    def find(self, place: tuple[int, int], key: tuple[tuple[int, int], ...]) -> _Stack | None:
        kept = self._stacks.get(place)
        if kept is None or kept[0].key != key:
            return None
        self._stacks[place] = kept[0], self._turn
        return kept[0]

    def make_room(self, place: tuple[int, int], num_bytes: int) -> bool:
        """Drop what `place` holds and what is stale, as far as needed; whether `num_bytes` fit then."""
        self._drop(place)
        stale = [other for other, (_, turn) in self._stacks.items() if self._turn - turn > STALE_TURNS]
        while stale and self.used_bytes + num_bytes > self._max_bytes:
            self._drop(stale.pop(0))
        return self.used_bytes + num_bytes <= self._max_bytes

    def put(self, place: tuple[int, int], stack: _Stack) -> None:
        """Keep a stack that `make_room` found room for."""
        self._stacks[place] = stack, self._turn
        self.used_bytes += stack.num_bytes

    def _drop(self, place: tuple[int, int]) -> None:
        if (kept := self._stacks.pop(place, None)) is not None:
            self.used_bytes -= kept[0].num_bytes


@contextmanager
def _threads_for(multiply_adds: float) -> Generator[None]:
    """One thread for a loop of small products of about that size: waking the others costs more than they save."""
    threads = torch.get_num_threads()
    if threads == 1 or multiply_adds >= SMALL_PRODUCT:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rank_class(rank: int) -> int:
    """Ranks of one class differ by less than four times, so padding to the widest stays cheap."""
    return (rank.bit_length() - 1) // 2


def _split(active: tuple[Segment, ...], classes: tuple[int, ...]) -> tuple[tuple[Segment, ...], tuple[_Tile, ...]]:
    short: dict[int, list[Segment]] = {}
    for segment, rank_class in zip(active, classes, strict=True):
        if segment.num_rows < SHORT_ROWS:
            short.setdefault(rank_class, []).append(segment)
    batched = {c: tuple(segments) for c, segments in short.items() if len(segments) >= MIN_BATCHED}
    taken = {segment for segments in batched.values() for segment in segments}
    looped = tuple(segment for segment in active if segment not in taken)
    return looped, tuple(_make_tile(segments, c) for c, segments in sorted(batched.items()))


def _make_tile(segments: tuple[Segment, ...], rank_class: int) -> _Tile:
    length = max(s.num_rows for s in segments)
    gapless = all(left.end == right.start for left, right in pairwise(segments))
    if gapless and all(s.num_rows == length for s in segments):
        return _Tile(segments, rank_class, length, None, None, None)
    starts = torch.tensor([s.start for s in segments])[:, None]
    counts = torch.tensor([s.num_rows for s in segments])[:, None]
    steps = torch.arange(length)[None, :]
    gather = (starts + torch.minimum(steps, counts - 1)).view(-1)  # padding repeats the last row; it is thrown away
    real = (steps < counts).view(-1).nonzero().view(-1)
    return _Tile(segments, rank_class, length, gather, gather[real], real)


def _gathered(x: torch.Tensor, tile: _Tile) -> torch.Tensor:
    """x of a tile, [n, length, d_in]."""
    gapless = slice(tile.segments[0].start, tile.segments[-1].end)
    rows = x[gapless] if tile.gather is None else x.index_select(0, tile.gather)
    return rows.reshape(len(tile.segments), tile.length, x.shape[1])


def _scatter_add(out: torch.Tensor, tile: _Tile, h: torch.Tensor, b: torch.Tensor) -> None:
    if tile.gather is None:
        target = out[tile.segments[0].start : tile.segments[-1].end]
        target.view(len(tile.segments), tile.length, -1).baddbmm_(h, b)
        return
    assert tile.rows is not None and tile.real is not None
    delta = torch.bmm(h, b).view(-1, out.shape[1])
    out.index_add_(0, tile.rows, delta.index_select(0, tile.real))  # rows are distinct: the order cannot matter
