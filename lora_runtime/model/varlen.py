"""Ways to attend within packed sequences; all compute the same.

Packed tensors are [T, heads, D], and come back as [T, H, D of the value].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from lora_runtime.batch import Batch, EqualRun, Step, equal_runs_of
from lora_runtime.model.kv_layouts import Scoring, masked_attention

_HALVES = (torch.float16, torch.bfloat16)
_MAX_HEAD = 256  # of flash attention, which also takes whole vectors of 8 alone
_HEAD_STEP = 8
_LEAST_CAPABILITY = (8, 0)  # of the device, for torch's packed flash attention
_TAKEN = inspect.signature(varlen_attn).parameters.keys()  # torch added them one after the other
_IS_COMPLETE = {"scale", "window_size"} <= _TAKEN
_TAKES_GROUPS = "enable_gqa" in _TAKEN  # query heads that share a KV head; else each gets a copy of it


@dataclass(frozen=True, slots=True)
class Masking:
    """What a token sees of its own sequence: i sees j if |i - j| < window, and if `causal` only j <= i."""

    causal: bool
    window: int | None
    scale: float | None  # of the products; None: 1 / sqrt(D)
    softcap: float | None = None  # c: scores become c * tanh(score / c)


class AttentionKind(Enum):
    """Which way a batch's attention goes."""

    VARLEN = "torch's packed flash attention"
    EQUAL_RUNS = "a call for each run of sequences of one length"  # whose number differs from batch to batch
    MASKED = "one call with a mask of [T, T]"  # the same launches whatever the sequences are


@dataclass(frozen=True, slots=True)
class _Whole:
    """Of the sequences that are all in a batch, when others continue there: as `Batch` has it of all."""

    cu_seqlens: torch.Tensor
    equal_runs: tuple[EqualRun, ...]
    max_length: int


def choose_attention(
    query: torch.Tensor, value: torch.Tensor, *, is_static: bool, softcap: float | None = None
) -> AttentionKind:
    """The way for heads like these; `is_static` asks for launches that do not depend on the lengths."""
    if softcap is None and can_use_varlen(query, value):
        return AttentionKind.VARLEN
    return AttentionKind.MASKED if is_static else AttentionKind.EQUAL_RUNS


def can_use_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's packed flash attention takes such heads on their device."""
    width = query.shape[-1]
    fits = _IS_COMPLETE and width == value.shape[-1] and width % _HEAD_STEP == 0 and width <= _MAX_HEAD
    return fits and query.dtype in _HALVES and query.is_cuda and _capability(query.device) >= _LEAST_CAPABILITY


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def attend(
    kind: AttentionKind, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, masking: Masking
) -> torch.Tensor:
    """Attention of each of the step's sequences that are all in the batch with itself; q, k and v have their tokens."""
    return _WAYS[kind](q, k, v, step, masking)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, masking: Masking) -> torch.Tensor:
    batch = _whole(step)
    shared = q.shape[1] // k.shape[1]
    more: dict[str, Any] = {"enable_gqa": shared > 1} if _TAKES_GROUPS else {}
    if shared > 1 and not _TAKES_GROUPS:
        k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
    before = -1 if masking.window is None else masking.window - 1
    found = varlen_attn(
        q,
        k,
        v,
        batch.cu_seqlens,
        batch.cu_seqlens,
        batch.max_length,
        batch.max_length,
        scale=masking.scale,
        window_size=(before, 0 if masking.causal else before),
        **more,
    )
    assert isinstance(found, torch.Tensor), "nothing beside the output was asked for"
    return found


def _equal_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, masking: Masking) -> torch.Tensor:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for run in _whole(step).equal_runs:
        rows = slice(run.start, run.start + run.count * run.length)
        mask = _run_mask(run.length, masking, q.device)
        parts = [_sequences(t[rows], run) for t in (q, k, v)]
        attended = _dense(parts[0], parts[1], parts[2], mask, masking)  # [count, H, length, D]
        out[rows].view(run.count, run.length, *out.shape[1:]).copy_(attended.transpose(1, 2))
    return out


def _whole(step: Step) -> Batch | _Whole:
    batch = step.batch
    if not batch.num_cached_rows:
        return batch
    if "whole" not in step.attention_cache:
        first, lengths = batch.num_cached_rows, batch.lengths[batch.num_cached_rows :]
        ends = batch.cu_seqlens[first:] - batch.cu_seqlens[first]
        step.attention_cache["whole"] = _Whole(ends, equal_runs_of(lengths), max(lengths))
    return step.attention_cache["whole"]


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, masking: Masking
) -> torch.Tensor:
    """q [n, H, L, D], k and v [n, H_kv, L, D] → [n, H, L, D]; `mask` None: what `masking` says without its window."""
    if masking.softcap is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=masking.causal and mask is None,
            scale=masking.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
    if mask is None:
        steps = torch.arange(q.shape[2], device=q.device)
        mask = _sees(steps[:, None] - steps[None, :], replace(masking, window=None))
    scale = q.shape[-1] ** -0.5 if masking.scale is None else masking.scale
    return masked_attention(q, k, v, mask, Scoring(scale, None, masking.softcap))


def _sequences(rows: torch.Tensor, run: EqualRun) -> torch.Tensor:
    """[count * length, H, D] → [count, H, length, D], a view."""
    return rows.unflatten(0, (run.count, run.length)).transpose(1, 2)


def _run_mask(length: int, masking: Masking, device: torch.device) -> torch.Tensor | None:
    """[length, length], True where attention is allowed; None when the window covers the sequence."""
    if masking.window is None or masking.window >= length:
        return None
    steps = torch.arange(length, device=device)
    return _sees(steps[:, None] - steps[None, :], masking)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, masking: Masking) -> torch.Tensor:
    key = "mask", masking.causal, masking.window
    if key not in step.attention_cache:
        step.attention_cache[key] = _batch_mask(step.batch, masking)
    parts = [t.transpose(0, 1)[None] for t in (q, k, v)]
    attended = _dense(parts[0], parts[1], parts[2], step.attention_cache[key], masking)  # [1, H, T, D]
    return attended[0].transpose(0, 1)


def _batch_mask(batch: Batch, masking: Masking) -> torch.Tensor:
    """[T, T], True within each sequence where attention is allowed; from tensors of the batch alone."""
    steps = torch.arange(len(batch.input_ids), device=batch.input_ids.device, dtype=torch.int32)
    owner = torch.searchsorted(batch.cu_seqlens[1:], steps, right=True)
    return (owner[:, None] == owner[None, :]) & _sees(steps[:, None] - steps[None, :], masking)


def _sees(distance: torch.Tensor, masking: Masking) -> torch.Tensor:
    allowed = distance >= 0 if masking.causal else torch.ones_like(distance, dtype=torch.bool)
    return allowed if masking.window is None else allowed & (distance.abs() < masking.window)


_Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Step, Masking], torch.Tensor]
_WAYS: dict[AttentionKind, _Way] = {
    AttentionKind.VARLEN: _varlen,
    AttentionKind.EQUAL_RUNS: _equal_runs,
    AttentionKind.MASKED: _masked,
}
