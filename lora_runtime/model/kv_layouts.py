"""How keys and values lie in memory, and attention of one-query sequences over each layout; `kv_cache` chooses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from lora_runtime.kernels.gemm_batch import GemmBatch, Int64Array, Products, addresses
from lora_runtime.kv_blocks import KvConfig


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of a step: its last `num_queries` of `context_length` stored tokens are the step's."""

    num_queries: int
    context_length: int
    blocks: Sequence[int]

    def first_key(self, window: int | None) -> int:
        """The first position that its first query sees."""
        return 0 if window is None else max(0, self.context_length - self.num_queries + 1 - window)


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """Where sequences lie, as `varlen_attn` takes it: int32 on the device."""

    queries: torch.Tensor  # [n + 1], cumulative
    contexts: torch.Tensor  # [n + 1], cumulative
    used: torch.Tensor  # [n]: tokens of each
    blocks: torch.Tensor  # [n, B]
    max_queries: int
    max_context: int


class StepMetadata:
    """Where the packed batch's sequences lie, [T] tokens in order of `spans`; made once a step, for all layers."""

    def __init__(self, spans: Sequence[SequenceSpan], block_tokens: int, device: torch.device) -> None:
        assert spans, "a step has at least one sequence"
        for span in spans:
            assert 0 < span.num_queries <= span.context_length, f"{span} has no query, or more than tokens"
            assert len(span.blocks) * block_tokens >= span.context_length, f"{span} has too few blocks"
        self.spans = tuple(spans)
        self.device = device
        self.starts = list(accumulate((span.num_queries for span in spans), initial=0))
        self.num_tokens = self.starts[-1]
        self.decodes = [at for at, span in enumerate(spans) if span.num_queries == 1]
        self.decode_rows = torch.tensor([self.starts[at] for at in self.decodes], device=device)  # [n]
        self.max_queries = max((span.num_queries for span in spans), default=0)
        self.max_context = max((span.context_length for span in spans), default=0)
        self.columns_plans: dict[tuple[int | None, float], _ColumnsPlan] = {}
        self.rows_plans: dict[int | None, list[_RowsPlan]] = {}
        self._paged: PagedSpans | None = None

    def paged(self) -> PagedSpans:
        """The same for `varlen_attn`."""
        if self._paged is None:
            contexts = [span.context_length for span in self.spans]
            self._paged = PagedSpans(
                torch.tensor(self.starts, dtype=torch.int32, device=self.device),
                torch.tensor(list(accumulate(contexts, initial=0)), dtype=torch.int32, device=self.device),
                torch.tensor(contexts, dtype=torch.int32, device=self.device),
                _padded([span.blocks for span in self.spans]).to(self.device, torch.int32),
                self.max_queries,
                self.max_context,
            )
        return self._paged


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become weights, of one layer."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class KvStore(Protocol):
    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None: ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None: ...

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]: ...

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [H_kv, tokens, D] of whole blocks [B] in order."""
        ...

    def decode(self, layer: int, q: torch.Tensor, metadata: StepMetadata, scoring: Scoring) -> torch.Tensor:
        """q [n, H, D] of the sequences that have one query."""
        ...


@dataclass(frozen=True, slots=True)
class _RowsPlan:
    """Decodes of about equal length."""

    which: torch.Tensor  # [n] of the decodes
    blocks: torch.Tensor  # [n, B]
    seen: torch.Tensor  # [n, B * block_tokens]


class RowStore:
    """`[layer, block, token, H_kv, D]`."""

    def __init__(self, config: KvConfig, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device):
        self._block_tokens = block_tokens
        shape = config.num_layers, num_blocks, block_tokens, config.num_kv_heads, config.head_dim
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k[layer], self.v[layer]

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (t[layer][blocks].flatten(0, 1).transpose(0, 1) for t in (self.k, self.v))
        return k, v

    def decode(self, layer: int, q: torch.Tensor, metadata: StepMetadata, scoring: Scoring) -> torch.Tensor:
        out = torch.empty_like(q)
        if scoring.window not in metadata.rows_plans:
            metadata.rows_plans[scoring.window] = list(self._plan(metadata, scoring.window))
        for plan in metadata.rows_plans[scoring.window]:
            unseen = ~plan.seen[:, :, None, None]  # what nobody wrote may be NaN
            k, v = (t[layer][plan.blocks].flatten(1, 2).masked_fill_(unseen, 0) for t in (self.k, self.v))
            mask = plan.seen[:, None, None]
            queries = q[plan.which].unflatten(1, (k.shape[2], -1))  # a group is as rows of its KV head
            attended = masked_attention(queries, k.transpose(1, 2), v.transpose(1, 2), mask, scoring)
            out[plan.which] = attended.flatten(1, 2)
        return out

    def _plan(self, metadata: StepMetadata, window: int | None) -> Iterator[_RowsPlan]:
        alike: defaultdict[int, list[int]] = defaultdict(list)  # at most half of what is gathered is padding
        spans = [metadata.spans[at] for at in metadata.decodes]
        firsts = [span.first_key(window) for span in spans]
        skipped = [first // self._block_tokens for first in firsts]
        ends = [-(-span.context_length // self._block_tokens) for span in spans]
        blocks = [span.blocks[skip:end] for span, skip, end in zip(spans, skipped, ends, strict=True)]
        for at, ids in enumerate(blocks):
            alike[(len(ids) - 1).bit_length()].append(at)
        for which in alike.values():
            ids = _padded([blocks[at] for at in which])
            steps = torch.arange(ids.shape[1] * self._block_tokens)
            offsets = torch.tensor([skipped[at] * self._block_tokens for at in which])[:, None] + steps
            first = torch.tensor([firsts[at] for at in which])[:, None]
            end = torch.tensor([spans[at].context_length for at in which])[:, None]
            seen = (offsets >= first) & (offsets < end)
            device = metadata.device
            yield _RowsPlan(torch.tensor(which, device=device), ids.to(device), seen.to(device))


class ColumnStore:
    """K `[layer, H_kv, block, D, token]` and V `[layer, H_kv, block, token, D]`, fp32 on the CPU."""

    def __init__(self, config: KvConfig, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device):
        found = GemmBatch.find()
        assert found is not None and dtype is torch.float32 and device.type == "cpu", "MKL multiplies fp32 on the CPU"
        self._gemm, self._block_tokens = found, block_tokens
        shape = config.num_layers, config.num_kv_heads, num_blocks
        self.k = torch.zeros(*shape, config.head_dim, block_tokens)
        self.v = torch.zeros(*shape, block_tokens, config.head_dim)
        self._written: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # slots, their blocks and offsets

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        if self._written is None or self._written[0] is not slots:  # of a step all layers write to the same
            self._written = slots, slots // self._block_tokens, slots % self._block_tokens
        _, blocks, offsets = self._written
        self.k[layer][:, blocks, :, offsets] = k
        self.v[layer].flatten(1, 2).index_copy_(1, slots, v.transpose(0, 1))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.k[:, :, target] = self.k[:, :, source]
        self.v[:, :, target] = self.v[:, :, source]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k[layer], self.v[layer]

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.k[layer][:, blocks].transpose(2, 3).flatten(1, 2)
        return k, self.v[layer][:, blocks].flatten(1, 2)

    def decode(self, layer: int, q: torch.Tensor, metadata: StepMetadata, scoring: Scoring) -> torch.Tensor:
        key = scoring.window, scoring.scale
        if key not in metadata.columns_plans:
            metadata.columns_plans[key] = _ColumnsPlan(self, q.shape[1], metadata, scoring)
        plan = metadata.columns_plans[key]
        self._gemm.run(plan.score, q, addresses(self.k[layer], plan.k_places), plan.scores)
        if scoring.softcap is not None:
            _cap_(plan.scores, scoring.softcap).masked_fill_(plan.padding, -torch.inf)
        weights = torch.softmax(plan.scores, dim=-1)
        out = torch.empty_like(q)
        for products, v_places in plan.waves:
            self._gemm.run(products, weights, addresses(self.v[layer], v_places), out)
        return out


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring slots that one decode sees: `length` from `slot` on, the first is its key `at`."""

    row: int
    at: int
    slot: int
    length: int


class _ColumnsPlan:
    """The products of one step's decodes, for one window and scale; every layer runs the same."""

    def __init__(self, store: ColumnStore, num_heads: int, metadata: StepMetadata, scoring: Scoring) -> None:
        _, kv_heads, num_blocks, width, block_tokens = store.k.shape
        group, num_slots = num_heads // kv_heads, num_blocks * block_tokens
        spans = [metadata.spans[at] for at in metadata.decodes]
        lengths = [span.context_length - span.first_key(scoring.window) for span in spans]
        longest = max(lengths)
        self.scores = torch.full((len(spans), num_heads, longest), -torch.inf)  # what is no product's stays so
        self.padding = torch.arange(longest) >= torch.tensor(lengths)[:, None, None]  # [n, 1, longest]

        def placed(pieces: Sequence[_Piece]) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
            """Per piece and KV head: the first query head's row, key, slot, length."""
            fields = np.array([(one.row * num_heads, one.at, one.slot, one.length) for one in pieces], dtype=np.int64)
            row, at, slot, length = (np.repeat(column, kv_heads) for column in fields.T)
            head = np.tile(np.arange(kv_heads), len(pieces))
            return row + head * group, at, slot + head * num_slots, length

        pieces = [list(_pieces(row, span, block_tokens, scoring.window)) for row, span in enumerate(spans)]
        row, at, slot, length = placed([piece for one in pieces for piece in one])
        shapes, strides = (group, length.astype(np.int32), width), (width, block_tokens, longest)
        self.score = Products(len(row), shapes, strides, row * width, row * longest + at)
        self.score.alpha[:] = scoring.scale
        self.k_places = slot // block_tokens * block_tokens * width + slot % block_tokens
        self.waves: list[tuple[Products, Int64Array]] = []
        runs = [_merged(one) for one in pieces]
        for wave in range(max(map(len, runs))):  # each adds one run of every sequence that has so many
            row, at, slot, length = placed([one[wave] for one in runs if wave < len(one)])
            shapes, strides = (group, width, length.astype(np.int32)), (longest, width, width)
            places = row * longest + at, row * width
            self.waves.append((Products(len(row), shapes, strides, *places, beta=float(wave > 0)), slot * width))


def _pieces(row: int, span: SequenceSpan, block_tokens: int, window: int | None) -> Iterator[_Piece]:
    """What a decode sees, block by block."""
    first = position = span.first_key(window)
    while position < span.context_length:
        block, offset = divmod(position, block_tokens)
        length = min(block_tokens - offset, span.context_length - position)
        yield _Piece(row, position - first, span.blocks[block] * block_tokens + offset, length)
        position += length


def _merged(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Pieces whose slots follow one another as one."""
    runs: list[_Piece] = []
    for piece in pieces:
        if runs and runs[-1].slot + runs[-1].length == piece.slot:
            last = runs.pop()
            piece = _Piece(last.row, last.at, last.slot, last.length + piece.length)
        runs.append(piece)
    return runs


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """q [n, H, T, D], k and v [n, H_kv, L, D], mask True where seen, broadcast to [n, H, T, L] → [n, H, T, D]."""
    if scoring.softcap is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.scale, enable_gqa=gqa)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [n, H_kv, H / H_kv, T, D]
    scores = _cap_(grouped @ k[:, :, None].transpose(-1, -2) * scoring.scale, scoring.softcap)
    scores.masked_fill_(~(mask if mask.dim() == 2 else mask[:, :, None]), -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v[:, :, None]).flatten(1, 2)


def _cap_(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    return scores.div_(softcap).tanh_().mul_(softcap)


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[n, longest], int64, filled up with block 0."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
