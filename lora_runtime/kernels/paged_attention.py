"""Attention over a KV cache in blocks, in Triton: for what torch's `varlen_attn` cannot read.

That is a torch whose `varlen_attn` takes no block table, blocks of fewer than 256 tokens, fp32, and scores with a
softcap. A program has a few queries of one sequence with all query heads that read one KV head, and a part of the keys
that they see; where there are few programs, keys are split among more, and a second kernel joins the parts in a fixed
order. Sums are fp32, and nothing is atomic, so equal calls give equal bits.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# ruff: noqa: N803, N806 - what is known when a kernel is compiled is upper case, as in Triton's own code

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_runtime.kernels.interpreting import IS_INTERPRETED, loop_bound

MAX_HEAD = 256
_PROGRAMS = 256  # about as many as an accelerator runs at once: with fewer, keys are split
_MOST_SPLITS = 16
_LEAST_KEYS = 128  # of a split
_NO_WINDOW = 1 << 30
_DECODE_ROWS, _CHUNK_ROWS = 16, 64  # query heads of a program; a product has at least 16 rows


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """q [T, H, D] of sequences whose last tokens they are, k and v [blocks, tokens, H_kv, D] → [T, H, D].

    Arguments are those of torch's `varlen_attn`, the mask causal and aligned at the end: `window_size` is (window - 1,
    or -1 for none, 0). `cu_seq_q` [n + 1], `seqused_k` [n] and `block_table` [n, B] are int32 on the device; what
    they say may change between replays of a captured call, up to `max_q` and `max_k`.
    """
    del cu_seq_k, enable_gqa  # the same is said by `seqused_k`, and by the shapes
    q = q.contiguous()
    num_tokens, num_heads, width = q.shape
    block_tokens, kv_heads = k.shape[1:3]
    assert k.stride() == v.stride() and k[0].is_contiguous() and window_size[1] == 0
    group = num_heads // kv_heads
    least = triton.next_power_of_2(group)
    block_rows = max(_DECODE_ROWS if max_q == 1 else _CHUNK_ROWS, least)
    num_sequences, tiles = len(seqused_k), triton.cdiv(max_q, block_rows // group)
    splits = _splits(tiles * num_sequences * kv_heads, max_k)
    out = torch.empty_like(q)
    parts, sums = out, out  # written by nobody where there is one split
    if splits > 1:
        parts = torch.empty(splits, num_tokens, num_heads, width, dtype=torch.float32, device=q.device)
        sums = torch.empty(splits, num_tokens, num_heads, 2, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(width))
    common: dict[str, Any] = {"HEADS": num_heads, "WIDTH": width, "PADDED": padded}
    with torch.cuda.device_of(q):
        _launch(_attend, (tiles, num_sequences * kv_heads, splits))(
            q, k, v, out, parts, sums, cu_seq_q, seqused_k, block_table, num_tokens, block_table.stride(0),
            k.stride(0), scale, _NO_WINDOW if window_size[0] < 0 else window_size[0] + 1, softcap or 1.0,
            GROUP=group, BLOCK_TOKENS=block_tokens, SOFTCAP=softcap is not None, BLOCK_ROWS=block_rows,
            BLOCK_KEYS=64 if padded <= 128 else 32, UPCAST=IS_INTERPRETED, IS_SPLIT=splits > 1,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32", num_warps=4, num_stages=2, **common,
        )  # fmt: skip
        if splits > 1:
            _launch(_join, (num_tokens, num_heads))(parts, sums, out, num_tokens, SPLITS=splits, num_warps=1, **common)
    return out


def _splits(programs: int, max_k: int) -> int:
    """A power of two: each is compiled for."""
    most = min(_MOST_SPLITS, triton.cdiv(_PROGRAMS, programs), triton.cdiv(max_k, _LEAST_KEYS))
    return 1 << (most.bit_length() - 1)


def _launch(kernel: Any, grid: tuple[int, ...]) -> Any:
    return kernel[grid]


@triton.jit(do_not_specialize=["num_tokens", "num_columns"])
def _attend(
    q,  # [T, HEADS, WIDTH]
    k,  # [blocks, BLOCK_TOKENS, KV heads, WIDTH], blocks k_stride apart
    v,
    out,  # [T, HEADS, WIDTH], where there is one split
    parts,  # [splits, T, HEADS, WIDTH] fp32: weighted sums of values, divided by the sum of weights
    sums,  # [splits, T, HEADS, 2] fp32: the largest score, and the sum of weights relative to it
    starts,  # [n + 1] int32: of each sequence's queries
    used,  # [n] int32: keys of each
    blocks,  # [n, num_columns] int32
    num_tokens,
    num_columns,
    k_stride,
    scale,
    window,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that read one KV head
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    KV_HEADS: tl.constexpr = HEADS // GROUP
    QUERIES: tl.constexpr = BLOCK_ROWS // GROUP
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    first = tl.program_id(0) * QUERIES
    if first >= count:
        return
    context = tl.load(used + sequence)
    rows = tl.arange(0, BLOCK_ROWS)
    queries = first + rows // GROUP
    row_mask = (rows < QUERIES * GROUP) & (queries < count)
    positions = context - count + queries
    columns = tl.arange(0, PADDED)
    column_mask = columns < WIDTH
    row_places = (start + queries).to(tl.int64) * HEADS + kv_head * GROUP + rows % GROUP  # of [T, HEADS]
    places = row_places[:, None] * WIDTH + columns[None, :]
    place_mask = row_mask[:, None] & column_mask[None, :]
    q_block = tl.load(q + places, mask=place_mask, other=0.0)
    if UPCAST:
        q_block = q_block.to(tl.float32)
    # keys that any of these queries sees, and this split's part of them
    last = context - count + tl.minimum(first + QUERIES, count)
    begin = tl.maximum(context - count + first - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    part_keys = tl.cdiv(tl.cdiv(last - begin, tl.num_programs(2)), BLOCK_KEYS) * BLOCK_KEYS
    begin += tl.program_id(2) * part_keys
    end = tl.minimum(begin + part_keys, last)
    num_steps = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_KEYS)
    largest = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    weights = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, PADDED], tl.float32)
    for step in range(loop_bound(num_steps)):
        keys = begin + step * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        key_mask = keys < end
        block = tl.load(blocks + sequence * num_columns + keys // BLOCK_TOKENS, mask=key_mask, other=0).to(tl.int64)
        at = block * k_stride + ((keys % BLOCK_TOKENS) * KV_HEADS + kv_head) * WIDTH
        k_block = tl.load(k + at[None, :] + columns[:, None], mask=key_mask[None, :] & column_mask[:, None], other=0.0)
        v_block = tl.load(v + at[:, None] + columns[None, :], mask=key_mask[:, None] & column_mask[None, :], other=0.0)
        if UPCAST:
            k_block = k_block.to(tl.float32)
            v_block = v_block.to(tl.float32)
        scores = tl.dot(q_block, k_block, input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
        distance = positions[:, None] - keys[None, :]
        seen = key_mask[None, :] & (distance >= 0) & (distance < window)
        scores = tl.where(seen, scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)  # of a row that has seen nothing yet
        shrink = tl.exp(largest - shift)
        exponents = tl.exp(scores - shift[:, None])
        weights = weights * shrink + tl.sum(exponents, 1)
        total = tl.dot(exponents.to(v_block.dtype), v_block, total * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    result = total / tl.where(weights == 0.0, 1.0, weights)[:, None]
    if IS_SPLIT:
        plane = tl.program_id(2).to(tl.int64) * num_tokens * HEADS
        tl.store(parts + plane * WIDTH + places, result, mask=place_mask)
        tl.store(sums + (plane + row_places) * 2, largest, mask=row_mask)
        tl.store(sums + (plane + row_places) * 2 + 1, weights, mask=row_mask)
    else:
        tl.store(out + places, result.to(out.dtype.element_ty), mask=place_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _join(
    parts,  # as `_attend` writes them
    sums,
    out,
    num_tokens,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One query of one head."""
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    planes = tl.arange(0, SPLITS).to(tl.int64) * num_tokens * HEADS + place
    columns = tl.arange(0, PADDED)
    largest = tl.load(sums + planes * 2)
    weights = tl.load(sums + planes * 2 + 1)
    weights = weights * tl.exp(largest - tl.max(largest, 0))
    mask = columns < WIDTH
    values = tl.load(parts + planes[:, None] * WIDTH + columns[None, :], mask=mask[None, :], other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)  # pyright: ignore[reportOperatorIssue]
    tl.store(out + place * WIDTH + columns, result.to(out.dtype.element_ty), mask=mask)
