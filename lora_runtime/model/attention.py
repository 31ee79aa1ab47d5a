"""Attention over packed sequences, registered with transformers under `multilora_packed`.

The packed batch is one row of T tokens; each sequence attends to itself alone. No mask is ever built: transformers
builds none for an implementation that has no entry in its mask registry.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from lora_runtime.batch import EqualRun, require_step
from lora_runtime.errors import BaseModelUnsupported

PACKED_ATTENTION = "multilora_packed"

# Arguments that architectures pass along and that change nothing here.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states"}


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention of each packed sequence with itself.

    query [1, H, T, D], key and value [1, H_kv, T, D] → ([1, T, H, D], None). `sliding_window` w lets token i see j
    when |i - j| < w. Raises BaseModelUnsupported for any argument that would alter attention in another way.
    """
    altering = sorted(
        name for name in kwargs.keys() - _HARMLESS if kwargs[name] is not None and kwargs[name] is not False
    )
    if altering or attention_mask is not None or dropout:
        raise BaseModelUnsupported(
            f"its attention passes {', '.join(altering) or 'a mask or dropout'}, which packed attention does not honour"
        )
    step = require_step()
    step.attention_modules.add(id(module))
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, H, D]
    for run in step.batch.equal_runs:
        rows = slice(run.start, run.start + run.count * run.length)
        q, k, v = (_sequences(t, rows, run) for t in (query, key, value))
        mask = _window_mask(run.length, sliding_window, causal, q.device)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scaling,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # [count, H, length, D]
        out[rows].view(run.count, run.length, *out.shape[1:]).copy_(attended.transpose(1, 2))
    return out.unsqueeze(0), None


def _sequences(packed: torch.Tensor, rows: slice, run: EqualRun) -> torch.Tensor:
    """[1, H, T, D] → [count, H, length, D], a view."""
    _, heads, _, width = packed.shape
    return (
        packed[0, :, rows]
        .unflatten(1, (run.count, run.length))
        .transpose(0, 1)
        .view(run.count, heads, run.length, width)
    )


def _window_mask(length: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """[length, length], True where attention is allowed; None when the window covers the sequence."""
    if window is None or window >= length:
        return None
    steps = torch.arange(length, device=device)
    distance = steps[:, None] - steps[None, :]
    near = distance.abs() < window
    return near & (distance >= 0) if causal else near


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
