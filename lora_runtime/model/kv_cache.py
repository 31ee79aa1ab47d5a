"""Keys and values of all layers in blocks, and attention of a packed batch over them.

**Semantics**, for query i of a sequence with context c, n of whose tokens are queries (its last n), at position
p = c - n + i: `out = softmax(softcap(scale * q_i @ K[j].T)) @ V[j]` over the j with max(0, p - window + 1) <= j <= p,
`softcap(x) = cap * tanh(x / cap)` where there is one (Gemma 2). Query head h reads KV head h // (H / H_kv).

Layouts, and the rule that chooses:

- COLUMNS on the CPU in fp32 with MKL: K `[H_kv, block, D, token]`, V `[H_kv, block, token, D]`. Sequences with one
  query (decodes) are two calls of MKL's batched product for all of them together: scores of each block, where K lies
  transposed already, and P V of each run of neighbouring blocks, so nothing is gathered and nothing but stored tokens
  is read. With 2 threads, 16 decodes, 9 heads of 64, 3 KV heads and blocks of 64 this took 0.5, 0.6 and 0.8 times as
  long as gathering whole runs for one SDPA at contexts 64, 256 and 1,024, and 0.13, 0.33 and 0.23 times as long as
  SDPA of each sequence.
- ROWS everywhere else: `[block, token, H_kv, D]`. On CUDA with one call for the whole batch, which a CUDA graph can
  hold: `choose_paged_attention` takes torch's `varlen_attn` where it reads a block table, else our kernel in Triton.
  Without either, decodes of about equal length are gathered into one SDPA with a mask.

Sequences with several queries (chunks of a prefill) are gathered and attended one by one on either gather path, where
the products are large enough. The storage begins as zeros: `varlen_attn` may load, though not use, slots that nobody
wrote.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch.nn import attention
from torch.nn.attention import varlen

from lora_runtime.errors import BaseModelUnsupported, CapacityExceeded
from lora_runtime.kernels.gemm_batch import GemmBatch
from lora_runtime.kv_blocks import BlockCopy, KvConfig, block_bytes
from lora_runtime.model.kv_layouts import (
    ColumnStore,
    KvStore,
    PagedSpans,
    RowStore,
    Scoring,
    SequenceSpan,
    StepMetadata,
    masked_attention,
)

PagedAttention = Callable[..., torch.Tensor]
_FLASH2_BLOCK_TOKENS = 256  # FlashAttention 2 takes multiples of it alone (its `mha_varlen_fwd`)
_CPU_BLOCK_TOKENS = 64  # 32 takes 6, 2 and at least 12 per cent longer at contexts 64, 256 and 1,024; 128 gains nothing
_GPU_BLOCK_TOKENS = 16
_TRITON_BLOCK_TOKENS = 64  # of our kernel, which reads as many keys at a time


class KvLayout(StrEnum):
    """How keys and values lie; see the module's docstring."""

    COLUMNS = "columns"
    ROWS = "rows"

    @staticmethod
    def choose(device: torch.device, dtype: torch.dtype) -> KvLayout:
        """COLUMNS where MKL's batched product can read it, else ROWS."""
        on_mkl = device.type == "cpu" and dtype is torch.float32 and GemmBatch.find() is not None
        return KvLayout.COLUMNS if on_mkl else KvLayout.ROWS


def default_block_tokens(device: torch.device) -> int:
    """Tokens of a block: the smallest that attention on this device reads at full speed."""
    if device.type != "cuda":
        return _CPU_BLOCK_TOKENS
    if not _reads_blocks():
        return _TRITON_BLOCK_TOKENS
    return _GPU_BLOCK_TOKENS if _newer_flash() else _FLASH2_BLOCK_TOKENS


def choose_paged_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int
) -> PagedAttention | None:
    """What attends over such a cache in one call; None where the gather path must.

    torch's `varlen_attn` needs CUDA, half precision, `block_table` and `seqused_k` in its signature, and of
    FlashAttention 2, which is in force unless FA3 or FA4 were activated, heads of at most 256 in eights and blocks of a
    multiple of 256 tokens. Our own kernel needs CUDA and Triton.
    """
    if device.type != "cuda":
        return None
    flash2 = block_tokens % _FLASH2_BLOCK_TOKENS == 0 and torch.cuda.get_device_capability(device)[0] >= 8
    fits = head_dim % 8 == 0 and head_dim <= 256 and (_newer_flash() or flash2)
    if dtype in (torch.float16, torch.bfloat16) and _reads_blocks() and fits:
        return cast(PagedAttention, varlen.varlen_attn)
    return own_paged_attention(device, head_dim)


def own_paged_attention(device: torch.device, head_dim: int) -> PagedAttention | None:
    """Our kernel, which also knows a softcap; None where it cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from lora_runtime.kernels.paged_attention import MAX_HEAD, paged_attention

    return paged_attention if head_dim <= MAX_HEAD else None


def _reads_blocks() -> bool:
    return {"block_table", "seqused_k", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys()


class KvCache:
    """`num_blocks` blocks of keys and values for every layer.

    Where one call attends over them, so that steps can be captured, there is one more that nobody is given: what fills
    a captured step up is stored there.
    """

    def __init__(
        self,
        config: KvConfig,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layout: KvLayout | None = None,
        paged_attention: PagedAttention | None = None,
    ) -> None:
        """`layout` and `paged_attention` are found by the module's rule when None.

        Raises CapacityExceeded when the device has no room for it.
        """
        assert config.itemsize == dtype.itemsize, f"{dtype} has elements of {dtype.itemsize} bytes"
        self.config, self.num_blocks, self.block_tokens, self.device = config, num_blocks, block_tokens, device
        self.layout = layout or KvLayout.choose(device, dtype)
        assert paged_attention is None or self.layout is KvLayout.ROWS, f"{self.layout} is not what it reads"
        self.paged_attention = paged_attention
        if paged_attention is None and self.layout is KvLayout.ROWS:
            self.paged_attention = choose_paged_attention(device, dtype, config.head_dim, block_tokens)
        self._own_attention = own_paged_attention(device, config.head_dim)
        self.spare_block = None if self.paged_attention is None else num_blocks
        num_stored = num_blocks + (self.spare_block is not None)
        store = ColumnStore if self.layout is KvLayout.COLUMNS else RowStore
        try:
            self._store: KvStore = store(config, num_stored, block_tokens, dtype, device)
        except RuntimeError as error:
            num_bytes = num_stored * block_bytes(config, block_tokens)
            message = f"a KV cache of {num_bytes} bytes cannot be allocated on {device}; give it fewer"
            raise CapacityExceeded(message, budget_bytes=num_bytes) from error

    def metadata(self, spans: Sequence[SequenceSpan]) -> StepMetadata:
        """Of one step, for `attend` of every layer."""
        return StepMetadata(spans, self.block_tokens, self.device)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v [T, H_kv, D] of T tokens at `slots` [T], int64: block * block_tokens + offset."""
        self._store.write(layer, k, v, slots)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, all layers, before anything is written to the targets."""
        if copies:
            source = torch.tensor([one.source for one in copies], device=self.device)
            self._store.copy(source, torch.tensor([one.target for one in copies], device=self.device))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        metadata: StepMetadata,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """q [T, H, D] of the packed batch, whose k and v are written already → [T, H, D].

        `scale` is D ** -0.5 when None. Raises BaseModelUnsupported unless H is a multiple of H_kv.
        """
        if q.shape[1] % self.config.num_kv_heads:
            raise BaseModelUnsupported(
                f"its {q.shape[1]} query heads are not a multiple of its {self.config.num_kv_heads} KV heads"
            )
        scoring = Scoring(q.shape[2] ** -0.5 if scale is None else scale, window, softcap)
        if self.can_attend_paged(softcap):
            return self.attend_paged(layer, q, metadata.paged(), scoring)
        out = torch.empty_like(q)
        if len(metadata.decodes) == metadata.num_tokens:
            return self._store.decode(layer, q.contiguous(), metadata, scoring)
        if metadata.decodes:
            rows = metadata.decode_rows
            out[rows] = self._store.decode(layer, q[rows], metadata, scoring)
        for span, start in zip(metadata.spans, metadata.starts, strict=False):
            if span.num_queries > 1:
                rows = slice(start, start + span.num_queries)
                out[rows] = self._prefill(layer, q[rows], span, scoring)
        return out

    def attend_paged(self, layer: int, q: torch.Tensor, spans: PagedSpans, scoring: Scoring) -> torch.Tensor:
        """As `attend`, by `paged_attention`, of sequences that tensors on the device say where they lie."""
        attend = self.paged_attention if scoring.softcap is None else self._own_attention
        assert attend is not None
        k, v = self._store.layer(layer)
        more: dict[str, Any] = {} if scoring.softcap is None else {"softcap": scoring.softcap}
        return attend(
            q,
            k,
            v,
            spans.queries,
            None if _newer_flash() else spans.contexts,  # FA3 refuses it beside a block table, FA2 demands it
            spans.max_queries,
            spans.max_context,
            scale=scoring.scale,
            window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
            enable_gqa=q.shape[1] != self.config.num_kv_heads,
            seqused_k=spans.used,
            block_table=spans.blocks,
            **more,
        )

    def can_attend_paged(self, softcap: float | None) -> bool:
        """Whether `attend_paged` can do it; torch's `varlen_attn` knows no softcap."""
        own = self._own_attention is not None and self.layout is KvLayout.ROWS
        return self.paged_attention is not None if softcap is None else own

    def _prefill(self, layer: int, q: torch.Tensor, span: SequenceSpan, scoring: Scoring) -> torch.Tensor:
        """Several queries [n, H, D] of one sequence, over its past and causally among themselves."""
        first, end = span.first_key(scoring.window), span.context_length
        block = first // self.block_tokens
        ids = torch.tensor(span.blocks[block : -(-end // self.block_tokens)], device=self.device)
        keys = slice(first - block * self.block_tokens, end - block * self.block_tokens)
        k, v = (t[None, :, keys] for t in self._store.gather(layer, ids))  # [1, H_kv, L, D]
        steps = torch.arange(first, end, device=self.device)
        distance = steps[-span.num_queries :, None] - steps  # [n, L]
        mask = distance >= 0 if scoring.window is None else (distance >= 0) & (distance < scoring.window)
        return masked_attention(q.transpose(0, 1)[None], k, v, mask, scoring)[0].transpose(0, 1)


def _newer_flash() -> bool:
    """Whether FlashAttention 3 or 4 was activated in torch."""
    return attention.current_flash_attention_impl() is not None
