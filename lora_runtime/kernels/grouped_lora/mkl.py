"""The CPU backend where torch has MKL: one call for the shrink of a group, one for the expand of a site.

A call takes all segments, each with its own rows and rank, straight from the arena: nothing is copied or padded, and
the threads share the segments. What a call needs beside addresses depends on the segments and their ranks alone, so
layers with the same ranks share it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.kernels.gemm_batch import FloatArray, GemmBatch, Int32Array, Int64Array, Products, addresses
from lora_runtime.kernels.grouped_lora.api import LoraPlan, Segment
from lora_runtime.types import Site, SiteGroup

_Index = slice | Int64Array


@dataclass(frozen=True, slots=True)
class _Placed:
    """A plan's segments, and where their adapters' matrices lie: a row per group or site, contiguous."""

    starts: Int64Array  # [segments] first rows
    num_rows: Int32Array  # [segments]
    a: Int64Array  # [groups, segments] address of A^T
    b: Int64Array  # [sites, segments] address of B^T
    ranks: Int32Array  # [sites, segments]
    scaling: FloatArray  # [sites, segments]
    patterns: dict[int, _Pattern] = field(default_factory=dict[int, "_Pattern"])  # by group
    alike: dict[bytes, _Pattern] = field(default_factory=dict[bytes, "_Pattern"])  # by the ranks of the group's sites

    @classmethod
    def of(cls, plan: LoraPlan, slots: SlotTable, buffer: torch.Tensor) -> _Placed:
        """Reads the slot table; `buffer` is the arena's."""
        chosen = np.array([segment.slot for segment in plan.segments], dtype=np.int64)

        def rows(table: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(table[chosen].T)

        return cls(
            np.array([segment.start for segment in plan.segments], dtype=np.int64),
            np.array([segment.num_rows for segment in plan.segments], dtype=np.int32),
            addresses(buffer, rows(slots.group_a)),
            addresses(buffer, rows(slots.b_offset.numpy())),
            rows(slots.rank.numpy()),
            rows(slots.scaling.numpy()),
        )


class _Pattern:
    """What is the same for all groups at which the segments have these ranks."""

    def __init__(self, placed: _Placed, ranks: Int32Array) -> None:
        """`ranks` [sites of the group, segments]."""
        total = ranks.sum(axis=0, dtype=np.int32)
        self._num_segments = ranks.shape[1]
        self.active = _chosen(total)
        self._starts = placed.starts[self.active]
        self._num_rows = placed.num_rows[self.active]
        self._ranks = ranks[:, self.active]
        self._total = total[self.active]
        self._columns = self._ranks.cumsum(axis=0, dtype=np.int32) - self._ranks
        sizes = self._num_rows.astype(np.int64) * self._total
        self._firsts: Int64Array = sizes.cumsum() - sizes  # of each segment in the scratch
        self.num_elements = int(sizes.sum())  # of the scratch
        self._shrinks: dict[tuple[int, int], Products] = {}
        self._expands: dict[tuple[int, int, int], tuple[_Index, Products]] = {}
        self._group_expands: dict[tuple[tuple[int, ...], int], tuple[Int64Array, Products]] = {}

    def shrink(self, d_in: int, stride: int) -> Products:
        """[rows, d_in] by [d_in, R] for the active segments; `stride` of the rows of x."""
        key = d_in, stride
        if key not in self._shrinks:
            self._shrinks[key] = Products(
                len(self._total),
                (self._num_rows, self._total, d_in),
                (stride, self._total, self._total),
                self._starts * stride,
                self._firsts,
            )
        return self._shrinks[key]

    def expand(self, place: int, d_out: int, stride: int) -> tuple[_Index, Products]:
        """[rows, r] by [r, d_out] for the segments, also returned, that have the group's site at `place`."""
        key = place, d_out, stride
        if key not in self._expands:
            own = _chosen(self._ranks[place])  # of the active ones
            ranks, total = self._ranks[place][own], self._total[own]
            products = Products(
                len(ranks),
                (self._num_rows[own], d_out, ranks),
                (total, d_out, stride),
                self._firsts[own] + self._columns[place][own],
                self._starts[own] * stride,
                beta=1.0,
            )
            segments = own if isinstance(self.active, slice) else self.active[own]
            self._expands[key] = segments, products
        return self._expands[key]

    def expand_group(self, widths: tuple[int, ...], stride: int) -> tuple[Int64Array, Products]:
        """As `expand`, of all sites, whose outputs of these widths lie side by side; which [site, segment] of the
        group's, flat, each product is.
        """
        key = widths, stride
        if key not in self._group_expands:
            place, own = np.nonzero(self._ranks)  # of the active segments, site by site
            d_outs, ends = np.array(widths), np.cumsum(widths)
            products = Products(
                len(place),
                (self._num_rows[own], d_outs[place].astype(np.int32), self._ranks[place, own]),
                (self._total[own], d_outs[place].astype(np.int32), stride),
                self._firsts[own] + self._columns[place, own],
                self._starts[own] * stride + (ends - d_outs)[place],
                beta=1.0,
            )
            segments = own if isinstance(self.active, slice) else self.active[own]
            self._group_expands[key] = place * self._num_segments + segments, products
        return self._group_expands[key]


def _chosen(ranks: Int32Array) -> _Index:
    """Where ranks are not zero; a slice where they all are, which is read without a copy."""
    return slice(None) if ranks.all() else np.flatnonzero(ranks)


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """`x A^T` of the active segments one after the other, each [rows, R of its adapter]."""

    values: torch.Tensor
    placed: _Placed
    pattern: _Pattern
    place_of: dict[int, int]  # site → its place in the group


class MklGroupedLora:
    """Bound to one arena in fp32 and its slot table. Rows in another precision are computed in fp32."""

    def __init__(self, arena: RankArena, slots: SlotTable, gemm: GemmBatch) -> None:
        assert arena.buffer.dtype is torch.float32, "the CPU's arena is in fp32"
        self._buffer = arena.buffer
        self._slots = slots
        self._gemm = gemm
        self._places = {group.index: _places(group) for group in slots.groups}
        self._rows = {index: _slice_of(list(places)) for index, places in self._places.items()}
        self._last: tuple[tuple[tuple[Segment, ...], int], _Placed] | None = None

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> _Shrunk:
        placed, pattern = self._pattern(group, plan)
        x = _fp32_rows(x)
        values = x.new_empty(pattern.num_elements)
        products = pattern.shrink(group.d_in, x.stride(0))
        self._gemm.run(products, x, placed.a[group.index][pattern.active], values)
        return _Shrunk(values, placed, pattern, self._places[group.index])

    def expand(self, shrunk: _Shrunk, site: Site, plan: LoraPlan, out: torch.Tensor) -> None:
        del plan
        placed, pattern, place = shrunk.placed, shrunk.pattern, shrunk.place_of[site.index]
        target = _fp32_rows(out)
        segments, products = pattern.expand(place, site.d_out, target.stride(0))
        products.alpha[:] = placed.scaling[site.index][segments]
        self._gemm.run(products, shrunk.values, placed.b[site.index][segments], target)
        if target is not out:
            out.copy_(target)  # rows without an adapter come back as they were

    def expand_group(self, shrunk: _Shrunk, group: SiteGroup, plan: LoraPlan, out: torch.Tensor) -> None:
        del plan
        placed, pattern, rows = shrunk.placed, shrunk.pattern, self._rows[group.index]
        target = _fp32_rows(out)
        which, products = pattern.expand_group(tuple(site.d_out for site in group.sites), target.stride(0))
        products.alpha[:] = placed.scaling[rows].reshape(-1)[which]
        self._gemm.run(products, shrunk.values, placed.b[rows].reshape(-1)[which], target)
        if target is not out:
            out.copy_(target)

    def _pattern(self, group: SiteGroup, plan: LoraPlan) -> tuple[_Placed, _Pattern]:
        placed: _Placed | None = plan.cache.get("placed")
        if placed is None:
            placed = plan.cache["placed"] = self._place(plan)
        pattern = placed.patterns.get(group.index)
        if pattern is None:
            ranks = placed.ranks[self._rows[group.index]]
            key = ranks.tobytes()
            if key not in placed.alike:
                placed.alike[key] = _Pattern(placed, ranks)
            pattern = placed.patterns[group.index] = placed.alike[key]
        return placed, pattern

    def _place(self, plan: LoraPlan) -> _Placed:
        """As the last step's where that had the same segments and nothing was loaded since: decodes go on alike."""
        key = plan.segments, self._slots.version
        if self._last is None or self._last[0] != key:
            self._last = key, _Placed.of(plan, self._slots, self._buffer)
        return self._last[1]


def _places(group: SiteGroup) -> dict[int, int]:
    return {site.index: place for place, site in enumerate(group.sites)}


def _slice_of(indices: list[int]) -> slice | list[int]:
    """Neighbours as a slice, which reads rows without a copy."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if indices == list(range(first, last + 1)) else indices


def _fp32_rows(x: torch.Tensor) -> torch.Tensor:
    """x [rows, d] itself, or a copy in fp32, so that each row is contiguous and ends before the next begins.

    The stride counts where there is one row, too: MKL refuses one shorter than a row, and computes nothing.
    """
    x = x.float()
    is_plain = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return x if is_plain else x.clone(memory_format=torch.contiguous_format)
