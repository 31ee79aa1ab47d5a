"""The Triton backend: two launches per site group, whatever adapters a batch has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.kernels.grouped_lora.api import LoraPlan
from lora_runtime.kernels.grouped_lora.triton_backend.compiles import num_compiled
from lora_runtime.kernels.grouped_lora.triton_backend.kernels import expand_kernel, shrink_kernel
from lora_runtime.kernels.grouped_lora.triton_backend.slots import DeviceSlots
from lora_runtime.kernels.grouped_lora.triton_backend.tiles import TILES, TileList
from lora_runtime.kernels.grouped_lora.triton_backend.tuning import RANK_BUCKETS, TOKEN_BUCKETS, TuningTable
from lora_runtime.kernels.interpreting import IS_INTERPRETED
from lora_runtime.types import Site, SiteGroup

_ALIGNMENT = 16  # bytes of a pointer, and elements of a stride, that Triton compiles a kernel of its own for


@dataclass(frozen=True, slots=True)
class _Shrunk:
    """`x A^T` of every row that has an adapter; the columns of a site are its ranks, others were never written."""

    planes: torch.Tensor  # [split, num_rows, width] fp32, to be summed
    group: SiteGroup


class TritonGroupedLora:
    """Bound to one arena and slot table on one device; x and out in fp32, fp16 or bf16, whatever the arena's dtype.

    fp32 is multiplied as fp32; tf32 stands in only for half-precision operands, which it holds exactly, and for
    `x A^T` beside them. Sums are fp32 in a fixed order, so equal calls give equal bits.

    With CUDA graphs: capture with `TileList.static_plan`; before each replay call `device_slots.refresh()` and
    `fill` the list; capture again when `device_slots.generation` has changed.
    """

    def __init__(self, arena: RankArena, slots: SlotTable, table: TuningTable | None = None) -> None:
        """`table`: block sizes of this device, defaults without one."""
        self._buffer = arena.buffer
        self._slots = slots
        self._table = table or TuningTable()
        self.device_slots = DeviceSlots(slots, arena.buffer.device)
        self._layouts: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}

    @property
    def num_compiled(self) -> int:
        """Kernels of this package compiled in this process."""
        return num_compiled()

    def prepare(self, plan: LoraPlan) -> TileList:
        """Bring the device's slots up to date, and make the plan's tiles unless it has them.

        `shrink` does it too; a plan that is captured is prepared before, since a graph must not hold these copies.
        """
        self.device_slots.refresh()
        if TILES not in plan.cache:
            tile_rows = self._table.tile_rows_for(plan.num_rows)
            plan.cache[TILES] = TileList.of(plan, tile_rows, self._buffer.device)
        return plan.cache[TILES]

    def tile_rows_for(self, num_rows: int) -> int:
        """The rows of a tile that suit batches of `num_rows` rows, for a `TileList` made by hand."""
        return self._table.tile_rows_for(num_rows)

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> _Shrunk:
        """x [at least the plan's rows, d_in]; rows may be strided. One launch for all sites of the group."""
        tiles = self.prepare(plan)
        width = tiles.width(group, plan)
        config = self._table.shrink_for(group.d_in, width, plan.num_rows)
        x = _like_contiguous(x)
        planes = self._new_planes(config.split, x.shape[0], width)
        grid = tiles.capacity, triton.cdiv(width, config.block_rank), config.split
        if tiles.capacity:
            with torch.cuda.device_of(x):
                _launch(shrink_kernel, grid)(
                    x, self._buffer, tiles.buffer, self.device_slots.a_offset, self.device_slots.group_rank, planes,
                    x.shape[0], len(self._slots.groups), group.index, group.d_in, x.stride(0), width,
                    SPLIT=config.split, BLOCK_ROWS=tiles.tile_rows, BLOCK_RANK=config.block_rank,
                    BLOCK_IN=config.block_in, UPCAST=IS_INTERPRETED or x.dtype != self._buffer.dtype,
                    PRECISION=self._precision(x.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
                    enable_fp_fusion=True,
                )  # fmt: skip
        return _Shrunk(planes, group)

    def expand(self, shrunk: _Shrunk, site: Site, plan: LoraPlan, out: torch.Tensor) -> None:
        """out [as many rows as x, d_out], of any strides."""
        self._expand(shrunk, (site,), plan, out)

    def expand_group(self, shrunk: _Shrunk, group: SiteGroup, plan: LoraPlan, out: torch.Tensor) -> None:
        """out [as many rows as x, sum of d_out], of any strides: one launch for all sites."""
        self._expand(shrunk, group.sites, plan, out)

    def _expand(self, shrunk: _Shrunk, sites: tuple[Site, ...], plan: LoraPlan, out: torch.Tensor) -> None:
        tiles = self.prepare(plan)
        split, num_rows, width = shrunk.planes.shape
        d_out = sum(site.d_out for site in sites)
        assert out.shape == (num_rows, d_out), f"out is {tuple(out.shape)}, not {(num_rows, d_out)}"
        config = self._table.expand_for(max(site.d_out for site in sites), width, plan.num_rows)
        layout = self._layout(sites, config.block_out)
        slots = self.device_slots
        target = _like_contiguous(out)
        if tiles.capacity:
            with torch.cuda.device_of(out):
                _launch(expand_kernel, (tiles.capacity, len(layout)))(
                    shrunk.planes, self._buffer, tiles.buffer, layout, slots.b_offset, slots.column, slots.rank,
                    slots.scaling, target, num_rows, slots.rank.shape[1], target.stride(0), width,
                    SPLIT=split, BLOCK_ROWS=tiles.tile_rows, BLOCK_RANK=config.block_rank, BLOCK_OUT=config.block_out,
                    IS_ALIGNED=all(site.d_out % _ALIGNMENT == 0 for site in sites),
                    PRECISION=self._precision(out.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
                    enable_fp_fusion=True,
                )  # fmt: skip
        if target is not out:
            out.copy_(target)

    def _layout(self, sites: tuple[Site, ...], block_out: int) -> torch.Tensor:
        """[blocks, 4] int32: where each block of outputs of these sites, which lie side by side, is; made once."""
        key = tuple(site.index for site in sites), block_out
        if key not in self._layouts:
            columns = accumulate((site.d_out for site in sites), initial=0)
            blocks = [
                (site.index, first, site.d_out, column)
                for site, column in zip(sites, columns, strict=False)
                for first in range(0, site.d_out, block_out)
            ]
            self._layouts[key] = torch.tensor(blocks, dtype=torch.int32, device=self._buffer.device)
        return self._layouts[key]

    def warm_up(self, groups: Iterable[SiteGroup], dtypes: Iterable[torch.dtype]) -> int:
        """Compile all that these groups can ever need, for any batch and any rank; returns how many kernels that were.

        Each kernel is launched once without a tile to work on.
        """
        before = num_compiled()
        shapes = {(group.d_in, tuple(site.d_out for site in group.sites)): group for group in groups}
        for dtype in dtypes:
            for group in shapes.values():
                for num_tokens in TOKEN_BUCKETS:
                    for rank in RANK_BUCKETS:
                        self._warm_up(group, dtype, num_tokens, rank)
        if self._buffer.is_cuda:
            torch.cuda.synchronize(self._buffer.device)
        return num_compiled() - before

    def _warm_up(self, group: SiteGroup, dtype: torch.dtype, num_tokens: int, rank: int) -> None:
        device = self._buffer.device
        tiles = TileList(1, self._table.tile_rows_for(num_tokens), device, max_rank=rank)
        plan = tiles.static_plan(self._slots, num_tokens)
        one_site = SiteGroup(group.index, group.d_in, group.sites[:1])  # its width is `rank`
        shrunk = self.shrink(torch.empty(2, group.d_in, dtype=dtype, device=device), one_site, plan)
        for site in group.sites:
            self.expand(shrunk, site, plan, torch.empty(2, site.d_out, dtype=dtype, device=device))
        d_out = sum(site.d_out for site in group.sites)
        self.expand_group(shrunk, group, plan, torch.empty(2, d_out, dtype=dtype, device=device))

    def _new_planes(self, split: int, num_rows: int, width: int) -> torch.Tensor:
        return torch.empty(split, num_rows, width, dtype=torch.float32, device=self._buffer.device)

    def _precision(self, dtype: torch.dtype) -> str:
        return "ieee" if torch.float32 in (dtype, self._buffer.dtype) else "tf32"


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    return kernel[grid]


def _like_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a contiguous copy where its strides or its address would need a kernel of their own."""
    width, alike = tensor.shape[1], tensor.stride(1) == 1 or tensor.shape[1] == 1
    alike = alike and (tensor.stride(0) % _ALIGNMENT == 0) == (width % _ALIGNMENT == 0)
    alike = alike and (tensor.stride(0) == 1) == (width == 1)
    if alike and tensor.data_ptr() % _ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
