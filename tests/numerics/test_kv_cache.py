"""Attention over the blocks of the cache equals plain causal attention over the whole sequences, in every layout.

Everything that a test has not written is NaN, in storage too, so that a slot read without having been written shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.errors import BaseModelUnsupported, CapacityExceeded
from lora_runtime.kernels.gemm_batch import GemmBatch
from lora_runtime.kv_blocks import BlockCopy, BlockPool, KvConfig, Namespace, block_bytes
from lora_runtime.model import kv_cache
from lora_runtime.model.kv_cache import KvCache, KvLayout, choose_paged_attention, default_block_tokens
from lora_runtime.model.kv_layouts import SequenceSpan
from tests.paged_attention import varlen_as_documented

CPU = torch.device("cpu")
LAYOUTS = [KvLayout.ROWS, *([KvLayout.COLUMNS] if GemmBatch.find() is not None else [])]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
TOLERANCE = 1e-5  # relative Frobenius, fp32


@dataclass(frozen=True)
class Heads:
    queries: int = 6
    kv: int = 2
    width: int = 16


@dataclass(frozen=True)
class Rule:
    """How one layer attends."""

    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


class World:
    """A cache full of NaN, and sequences with random q, k, v for two layers."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: Heads = Heads(),
        block_tokens: int = 4,
        layout: KvLayout = KvLayout.ROWS,
        seed: int = 0,
        **options: object,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.block_tokens = heads, block_tokens
        needed = [-(-length // block_tokens) for length in lengths]
        config = KvConfig(2, heads.kv, heads.width, 4)
        self.cache = KvCache(config, sum(needed) + 3, block_tokens, torch.float32, CPU, layout=layout, **options)  # pyright: ignore
        fill_with_nan(self.cache)
        order = list(range(sum(needed) + 3))
        if seed % 2:
            random.Random(seed).shuffle(order)
        self.blocks = [[order.pop(0) for _ in range(count)] for count in needed]
        self.q, self.k, self.v = (
            [torch.randn(2, length, count, heads.width, generator=generator) for length in lengths]
            for count in (heads.queries, heads.kv, heads.kv)
        )

    def store(self, which: int, start: int, end: int) -> None:
        slots = torch.tensor(
            [
                self.blocks[which][at // self.block_tokens] * self.block_tokens + at % self.block_tokens
                for at in range(start, end)
            ]
        )
        for layer in range(2):
            self.cache.write(layer, self.k[which][layer, start:end], self.v[which][layer, start:end], slots)

    def attend(self, chunks: Sequence[tuple[int, int, int]], rule: Rule = Rule()) -> torch.Tensor:
        """[layers, T, H, D] of chunks (sequence, start, end), all of them written."""
        spans = [SequenceSpan(end - start, end, self.blocks[which]) for which, start, end in chunks]
        metadata = self.cache.metadata(spans)
        q = torch.cat([self.q[which][:, start:end] for which, start, end in chunks], dim=1)
        return torch.stack(
            [
                self.cache.attend(layer, q[layer], metadata, scale=rule.scale, window=rule.window, softcap=rule.softcap)
                for layer in range(2)
            ]
        )

    def wanted(self, chunks: Sequence[tuple[int, int, int]], rule: Rule = Rule()) -> torch.Tensor:
        parts = [
            causal(self.q[which][:, :end], self.k[which][:, :end], self.v[which][:, :end], rule)[:, start:]
            for which, start, end in chunks
        ]
        return torch.cat(parts, dim=1)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> torch.Tensor:
    """[layers, L, H, D] of a whole sequence."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    steps = torch.arange(q.shape[2])
    distance = steps[:, None] - steps
    seen = (distance >= 0) & (distance < (rule.window or len(steps)))
    if rule.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=rule.scale).transpose(1, 2)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if rule.scale is None else rule.scale)
    scores = (rule.softcap * (scores / rule.softcap).tanh()).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def fill_with_nan(cache: KvCache) -> None:
    for layer in range(2):
        for stored in cache._store.layer(layer):  # pyright: ignore[reportPrivateUsage]
            stored.fill_(torch.nan)


def assert_close(out: torch.Tensor, wanted: torch.Tensor) -> None:
    assert out.shape == wanted.shape
    assert torch.isfinite(out).all(), "a slot that nobody wrote was read"
    assert (out - wanted).norm() <= TOLERANCE * wanted.norm()


block_sizes = st.sampled_from([1, 2, 4, 16])
rules = st.builds(
    Rule,
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    scale=st.none() | st.sampled_from([0.1, 1.0]),
)
some_heads = st.sampled_from([Heads(3, 3, 8), Heads(6, 2, 16), Heads(4, 1, 8), Heads(9, 3, 64)])


@every_layout
@settings(max_examples=60, deadline=None)
@given(data=st.data(), heads=some_heads, rule=rules, block_tokens=block_sizes, seed=st.integers(0, 9))
def test_any_mix_of_chunks_and_decodes_equals_causal_attention(
    layout: KvLayout, data: st.DataObject, heads: Heads, rule: Rule, block_tokens: int, seed: int
) -> None:
    chunks: list[tuple[int, int, int]] = []
    for which in range(data.draw(st.integers(1, 6))):
        end = data.draw(st.integers(1, 50))
        num_queries = data.draw(st.just(1) | st.integers(1, end))
        chunks.append((which, end - num_queries, end))
    world = World([end for _, _, end in chunks], heads, block_tokens, layout, seed)
    for which, _, end in chunks:
        world.store(which, 0, end)
    assert_close(world.attend(chunks, rule), world.wanted(chunks, rule))


@every_layout
@pytest.mark.parametrize("context", [1, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_contexts_at_the_borders_of_blocks(layout: KvLayout, context: int, window: int | None) -> None:
    world = World([context, 6], layout=layout)
    world.store(0, 0, context)
    world.store(1, 0, 6)
    for chunks in ([(0, context - 1, context)], [(0, 0, context), (1, 5, 6)]):
        assert_close(world.attend(chunks, Rule(window)), world.wanted(chunks, Rule(window)))


@every_layout
def test_a_sequence_prefilled_in_chunks_and_decoded_step_by_step_equals_one_pass(layout: KvLayout) -> None:
    world = World([13, 9], layout=layout)
    parts: list[torch.Tensor] = []
    world.store(1, 0, 8)
    for start, end in ((0, 5), (5, 6), (6, 11), (11, 12), (12, 13)):
        world.store(0, start, end)
        parts.append(world.attend([(1, 7, 8), (0, start, end)])[:, 1:])
    assert_close(torch.cat(parts, dim=1), world.wanted([(0, 0, 13)]))


@every_layout
def test_the_order_of_a_sequences_blocks_matters(layout: KvLayout) -> None:
    """The comparison is sharp: a wrong block table must fail it."""
    world = World([9], layout=layout)
    world.store(0, 0, 9)
    world.blocks[0][:2] = reversed(world.blocks[0][:2])
    chunks, rule = [(0, 8, 9)], Rule(window=7)
    with pytest.raises(AssertionError):
        assert_close(world.attend(chunks, rule), world.wanted(chunks, rule))


@every_layout
def test_a_freed_block_is_used_again_and_a_shared_one_is_copied(layout: KvLayout) -> None:
    """The pool's tables drive the cache: prefix reuse, fork, copy on write, and blocks of a freed sequence."""
    pool = BlockPool(6, 4)
    world = World([10, 10], layout=layout)
    world.k[1][:, :6], world.v[1][:, :6] = world.k[0][:, :6], world.v[0][:, :6]  # the same until a sample differs
    prefix = pool.allocate(Namespace(), list(range(6)))
    world.blocks[0] = prefix.blocks
    world.store(0, 0, 6)
    pool.mark_computed(prefix, 6)
    sample = pool.fork(prefix)
    for which, table in ((1, sample), (0, prefix)):
        world.blocks[which] = table.blocks
        for position in range(6, 10):
            copied = pool.append_slot(table, 50 * which + position).copy
            world.cache.copy([] if copied is None else [copied])
            world.store(which, position, position + 1)
            pool.mark_computed(table, position + 1)
    chunks = [(0, 9, 10), (1, 9, 10)]
    assert_close(world.attend(chunks), world.wanted(chunks))
    freed = set(prefix.blocks)
    pool.free(prefix)
    assert_close(world.attend(chunks[1:]), world.wanted(chunks[1:]))
    again = pool.allocate(Namespace("lora"), list(range(9)))
    assert set(again.blocks) & freed
    world.blocks[0] = again.blocks
    world.store(0, 0, 9)
    chunks = [(0, 0, 9), (1, 9, 10)]
    assert_close(world.attend(chunks), world.wanted(chunks))


@every_layout
def test_one_sequences_nan_stays_its_own(layout: KvLayout) -> None:
    world = World([9, 30, 2], layout=layout)
    world.k[1][:, 3] = torch.nan
    for which, length in ((0, 9), (1, 30), (2, 2)):
        world.store(which, 0, length)
    out = world.attend([(0, 8, 9), (1, 29, 30), (2, 0, 2)])
    wanted = world.wanted([(0, 8, 9), (2, 0, 2)])
    assert torch.isnan(out[:, 1]).all()
    assert_close(out[:, [0, 2, 3]], wanted)


@every_layout
def test_copies_of_blocks_are_whole(layout: KvLayout) -> None:
    world = World([4, 4], layout=layout)
    world.store(0, 0, 4)
    world.cache.copy([BlockCopy(world.blocks[0][0], world.blocks[1][0])])
    world.k[1], world.v[1] = world.k[0], world.v[0]
    assert_close(world.attend([(1, 0, 4)]), world.wanted([(1, 0, 4)]))


def stand_in(q: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
    """Told exactly how long the longest sequence is."""
    queries, _, max_q, max_k = args[2:]
    assert int(queries.diff().max()) == max_q and int(more["seqused_k"].max()) == max_k
    return varlen_as_documented(q, *args, **more)


@pytest.mark.parametrize("rule", [Rule(), Rule(window=3), Rule(window=1, scale=0.3)])
@pytest.mark.parametrize("heads", [Heads(), Heads(3, 3, 8)])
def test_varlen_attention_gets_the_arguments_of_the_same_computation(heads: Heads, rule: Rule) -> None:
    world = World([9, 5, 12, 1], heads, seed=1, paged_attention=stand_in)
    for which, length in enumerate([9, 5, 12, 1]):
        world.store(which, 0, length)
    chunks = [(0, 8, 9), (1, 0, 5), (2, 6, 12), (3, 0, 1)]
    assert_close(world.attend(chunks, rule), world.wanted(chunks, rule))


def test_varlen_attention_does_not_get_a_softcap_it_would_ignore() -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise NotImplementedError

    world = World([6], paged_attention=refuse)
    world.store(0, 0, 6)
    assert_close(world.attend([(0, 2, 6)], Rule(softcap=0.5)), world.wanted([(0, 2, 6)], Rule(softcap=0.5)))
    with pytest.raises(NotImplementedError):
        world.attend([(0, 2, 6)])


def test_flash_3_gets_no_cumulative_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def note(q: torch.Tensor, _k: object, _v: object, _queries: object, cu_seq_k: object, *_: object, **__: object):
        seen.append(cu_seq_k)
        return q

    monkeypatch.setattr(kv_cache.attention, "current_flash_attention_impl", lambda: "FA3")
    world = World([6], paged_attention=note)
    world.attend([(0, 2, 6)])
    assert seen == [None, None]


def test_the_rule_that_chooses_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    capability: list[tuple[int, int]] = [(9, 0)]

    def get_device_capability(_device: torch.device) -> tuple[int, int]:
        return capability[-1]

    def older_varlen_attn(query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor) -> torch.Tensor:
        return query

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    torchs, own = kv_cache.varlen.varlen_attn, kv_cache.own_paged_attention(cuda, 64)
    assert choose_paged_attention(cuda, torch.bfloat16, 64, 256) is torchs
    assert choose_paged_attention(cuda, torch.bfloat16, 64, 16) is own, "FlashAttention 2 takes 256 tokens"
    assert choose_paged_attention(cuda, torch.float32, 64, 256) is own
    assert choose_paged_attention(cuda, torch.bfloat16, 60, 256) is own
    assert choose_paged_attention(cuda, torch.bfloat16, 512, 256) is None
    assert choose_paged_attention(CPU, torch.bfloat16, 64, 256) is None
    assert (default_block_tokens(CPU), default_block_tokens(cuda)) == (64, 256)
    capability.append((7, 5))
    assert choose_paged_attention(cuda, torch.float16, 64, 256) is own
    monkeypatch.setattr(kv_cache.attention, "current_flash_attention_impl", lambda: "FA3")
    assert choose_paged_attention(cuda, torch.bfloat16, 64, 16) is torchs
    assert default_block_tokens(cuda) == 16
    monkeypatch.setattr(kv_cache.varlen, "varlen_attn", older_varlen_attn)
    assert choose_paged_attention(cuda, torch.bfloat16, 64, 16) is own
    assert default_block_tokens(cuda) == 64
    monkeypatch.setattr(kv_cache, "find_spec", lambda _: None)
    assert choose_paged_attention(cuda, torch.bfloat16, 64, 16) is None, "there is no Triton"


def test_the_rule_that_chooses_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KvLayout.choose(CPU, torch.bfloat16) is KvLayout.ROWS
    assert KvLayout.choose(torch.device("cuda"), torch.float32) is KvLayout.ROWS
    assert KvLayout.choose(CPU, torch.float32) is LAYOUTS[-1]
    monkeypatch.setattr(GemmBatch, "find", staticmethod(lambda: None))
    assert KvLayout.choose(CPU, torch.float32) is KvLayout.ROWS


def test_heads_that_do_not_divide_are_refused() -> None:
    world = World([4], Heads(5, 2, 8))
    with pytest.raises(BaseModelUnsupported, match="5 query heads"):
        world.attend([(0, 3, 4)])


def test_a_cache_that_memory_does_not_hold_is_refused() -> None:
    config = KvConfig(1, 1, 64, 4)
    num_blocks = (1 << 60) // block_bytes(config, 16)
    with pytest.raises(CapacityExceeded, match="give it fewer"):
        KvCache(config, num_blocks, 16, torch.float32, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_tokens", [16, 256])
@pytest.mark.parametrize("window", [None, 100])
def test_a_gpu_equals_causal_attention(dtype: torch.dtype, block_tokens: int, window: int | None) -> None:
    """Through `varlen_attn` with 256 tokens a block where it reads them, else our kernel; NaN of others stays away."""
    lengths, queries = [300, 1, 256, 700], [1, 1, 256, 33]
    world = World(lengths, Heads(8, 2, 64), block_tokens, seed=1)
    config = KvConfig(2, 2, 64, 2)
    device = torch.device("cuda")
    cache = KvCache(config, world.cache.num_blocks, block_tokens, dtype, device)
    assert cache.paged_attention is not None
    fill_with_nan(cache)
    for which, length in enumerate(lengths):
        slots = torch.tensor(
            [world.blocks[which][at // block_tokens] * block_tokens + at % block_tokens for at in range(length)]
        )
        for layer in range(2):
            k, v = (t[which][layer].to(device, dtype) for t in (world.k, world.v))
            cache.write(layer, k, v, slots.to(device))
    chunks = [(which, end - count, end) for which, (end, count) in enumerate(zip(lengths, queries, strict=True))]
    spans = [SequenceSpan(end - start, end, world.blocks[which]) for which, start, end in chunks]
    metadata = cache.metadata(spans)
    q = torch.cat([world.q[which][:, start:end] for which, start, end in chunks], dim=1).to(device, dtype)
    out = torch.stack([cache.attend(layer, q[layer], metadata, window=window) for layer in range(2)])
    world.q, world.k, world.v = ([t.to(dtype).double() for t in one] for one in (world.q, world.k, world.v))
    wanted = world.wanted(chunks, Rule(window))
    error = (out.double().cpu() - wanted).norm() / wanted.norm()
    assert error <= {torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]
