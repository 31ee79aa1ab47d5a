"""The two kernels of `grouped_lora`.

Work is a flat list of tiles (`tiles.py`), read on the device: a launch has one program per tile of capacity, and
those past the count leave. So a launch captured in a CUDA graph serves any batch that fits its capacity.

What is baked into a launch: the grid, the scratch's width, the split, block sizes. What is read on the device: tiles,
offsets, ranks, scalings. Offsets into tensors are int64.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# ruff: noqa: N803 - what is known when a kernel is compiled is upper case, as in Triton's own code

from __future__ import annotations

import triton
import triton.language as tl

from lora_runtime.kernels.interpreting import loop_bound

# By default Triton compiles a kernel anew for an argument that is 1, or the first multiple of 16.
COUNTS = ("num_rows", "num_groups", "group", "num_sites")


@triton.jit(do_not_specialize=COUNTS)
def shrink_kernel(
    x,  # [num_rows, d_in], rows x_stride apart
    arena,
    tiles,  # int32: count, then (slot, first row, rows) of each
    a_offset,  # [slot, group] int64: where the group's A, [rank, d_in], begins
    group_rank,  # [slot, group] int32
    planes,  # [SPLIT, num_rows, width] fp32: partial sums of x A^T
    num_rows,
    num_groups,
    group,
    d_in,
    x_stride,
    width,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32
    PRECISION: tl.constexpr,
):
    """One tile, one block of ranks, one part of d_in; each plane is written whole, so nothing is cleared before."""
    tile = tl.program_id(0)
    if tile >= tl.load(tiles):
        return
    slot = tl.load(tiles + 1 + 3 * tile).to(tl.int64)
    rank = tl.load(group_rank + slot * num_groups + group)
    first_rank = tl.program_id(1) * BLOCK_RANK
    if first_rank >= rank:
        return
    first_row = tl.load(tiles + 2 + 3 * tile)
    row_steps = tl.arange(0, BLOCK_ROWS)
    row_mask = row_steps < tl.load(tiles + 3 + 3 * tile)
    rows = (first_row + row_steps).to(tl.int64)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    rank_mask = ranks < rank
    a = arena + tl.multiple_of(tl.load(a_offset + slot * num_groups + group), 16)
    part = tl.program_id(2)
    num_steps = tl.cdiv(tl.cdiv(d_in, SPLIT), BLOCK_IN)
    total = tl.zeros([BLOCK_ROWS, BLOCK_RANK], dtype=tl.float32)
    for step in range(loop_bound(num_steps)):
        columns = (part * num_steps + step) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        column_mask = columns < d_in
        x_block = tl.load(
            x + rows[:, None] * x_stride + columns[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0
        )
        a_block = tl.load(
            a + ranks[None, :].to(tl.int64) * d_in + columns[:, None],
            mask=rank_mask[None, :] & column_mask[:, None],
            other=0.0,
        )
        if UPCAST:
            x_block = x_block.to(tl.float32)
            a_block = a_block.to(tl.float32)
        total = tl.dot(x_block, a_block, total, input_precision=PRECISION)
    plane = planes + part.to(tl.int64) * num_rows * width
    tl.store(plane + rows[:, None] * width + ranks[None, :], total, mask=row_mask[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=COUNTS)
def expand_kernel(
    planes,  # [SPLIT, num_rows, width] fp32
    arena,
    tiles,  # int32: count, then (slot, first row, rows) of each
    layout,  # int32: (site, first of its outputs, how many it has, the column of `out` of its first) of each block
    b_offset,  # [slot, site] int64: where the site's B, [rank, d_out], begins
    column,  # [slot, site] int32: of the planes, the site's first
    site_rank,  # [slot, site] int32
    scaling,  # [slot, site] fp32
    out,  # [num_rows, all sites' d_out], rows out_stride apart
    num_rows,
    num_sites,
    out_stride,
    width,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # widths of sites are multiples of 16
    PRECISION: tl.constexpr,
):
    """One tile, one block of a site's d_out: sums the planes in order, times B, times scaling, plus out, rounded once.

    B is exact in float32 (and in tf32, when it is stored in half precision), where x A^T cannot overflow.
    """
    tile = tl.program_id(0)
    if tile >= tl.load(tiles):
        return
    block = layout + 4 * tl.program_id(1)
    site, first_out, d_out, first_column = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    if IS_ALIGNED:
        first_out, d_out = tl.multiple_of(first_out, 16), tl.multiple_of(d_out, 16)
        first_column = tl.multiple_of(first_column, 16)
    slot = tl.load(tiles + 1 + 3 * tile).to(tl.int64)
    at = slot * num_sites + site
    rank = tl.load(site_rank + at)
    if rank == 0:
        return
    first_row = tl.load(tiles + 2 + 3 * tile)
    row_steps = tl.arange(0, BLOCK_ROWS)
    row_mask = row_steps < tl.load(tiles + 3 + 3 * tile)
    rows = (first_row + row_steps).to(tl.int64)
    outs = first_out + tl.arange(0, BLOCK_OUT)
    out_mask = outs < d_out
    b = arena + tl.multiple_of(tl.load(b_offset + at), 16)
    plane = planes + tl.load(column + at)
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
    for first_rank in range(0, loop_bound(rank), BLOCK_RANK):
        ranks = first_rank + tl.arange(0, BLOCK_RANK)
        rank_mask = ranks < rank
        places = rows[:, None] * width + ranks[None, :]
        place_mask = row_mask[:, None] & rank_mask[None, :]
        shrunk = tl.load(plane + places, mask=place_mask, other=0.0)
        for part in tl.static_range(1, SPLIT):  # pyright: ignore[reportGeneralTypeIssues]
            offset = tl.full([], part, tl.int64) * num_rows * width
            shrunk += tl.load(plane + offset + places, mask=place_mask, other=0.0)
        b_block = tl.load(
            b + ranks[:, None].to(tl.int64) * d_out + outs[None, :],
            mask=rank_mask[:, None] & out_mask[None, :],
            other=0.0,
        )
        total = tl.dot(shrunk, b_block.to(tl.float32), total, input_precision=PRECISION)
    places = out + rows[:, None] * out_stride + (first_column + outs)[None, :]
    mask = row_mask[:, None] & out_mask[None, :]
    before = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    after = before + total * tl.load(scaling + at)
    tl.store(places, after.to(out.dtype.element_ty), mask=mask)
