"""Attention over packed sequences, registered with transformers under `multilora_packed`.

The packed batch is one row of T tokens; each sequence attends to itself alone. No mask is ever built: transformers
builds none for an implementation that has no entry in its mask registry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from lora_runtime.batch import Step, require_step
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.model.varlen import Masking, attend, choose_attention

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
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention of each packed sequence with itself.

    query [1, H, T, D], key and value [1, H_kv, T, D] → ([1, T, H, D], None). `sliding_window` w lets token i see j
    when |i - j| < w. `softcap` c bounds the scores, c * tanh(score / c). The first sequences, where they continue,
    attend to what the KV cache has of them too. Raises BaseModelUnsupported for any argument that would alter
    attention in another way.
    """
    altering = sorted(
        name for name in kwargs.keys() - _HARMLESS if kwargs[name] is not None and kwargs[name] is not False
    )
    if altering or attention_mask is not None or dropout:
        raise BaseModelUnsupported(
            f"its attention passes {', '.join(altering) or 'a mask or dropout'}, which packed attention does not honour"
        )
    step = require_step()
    step.attention_modules[id(module)] = key.shape[1], key.shape[-1], value.shape[-1]
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    masking = Masking(causal, sliding_window, scaling, softcap)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, D], views
    if step.paged is None:
        return _attend_whole(step, q, k, v, masking)[None], None
    if not causal:
        raise BaseModelUnsupported("its attention is not causal, so that a sequence cannot be continued")
    first = step.paged.num_tokens
    continued = step.paged.attend(
        module, q[:first], k[:first], v[:first], scale=scaling, window=sliding_window, softcap=softcap
    )
    if first == len(q):
        return continued[None], None
    return torch.cat([continued, _attend_whole(step, q[first:], k[first:], v[first:], masking)])[None], None


def _attend_whole(step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking) -> torch.Tensor:
    """Of the sequences that are all in the batch, [t, H, D] each."""
    kind = "kind", q.shape[-1], v.shape[-1], masking.softcap
    if kind not in step.attention_cache:  # once per batch, or per kind of layer where those differ
        step.attention_cache[kind] = choose_attention(q, v, is_static=step.is_static, softcap=masking.softcap)
    return attend(step.attention_cache[kind], q, k, v, step, masking)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
