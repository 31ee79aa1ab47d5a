"""`varlen_attn` over a block table, as torch documents it, on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def varlen_as_documented(
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
) -> torch.Tensor:
    """`varlen_attn` by its documentation, bottom right aligned as FlashAttention's causal mask is."""
    assert {t.dtype for t in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert k.dim() == 4 and enable_gqa == (q.shape[1] != k.shape[2])
    lengths = cu_seq_q.diff().tolist()
    assert max(lengths) <= max_q and int(seqused_k.max()) <= max_k
    assert cu_seq_k is not None and cu_seq_k.diff().tolist() == seqused_k.tolist()
    parts: list[torch.Tensor] = []
    for queries, used, table in zip(q.split(lengths), seqused_k.tolist(), block_table.tolist(), strict=True):
        keys, values = (t[table].flatten(0, 1)[:used].transpose(0, 1) for t in (k, v))
        distance = torch.arange(used)[-len(queries) :, None] - torch.arange(used)
        seen = (distance >= -window_size[1]) & ((window_size[0] < 0) | (distance <= window_size[0]))
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1), keys, values, attn_mask=seen, scale=scale, enable_gqa=True
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)
