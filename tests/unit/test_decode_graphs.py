"""Steps that continue texts by a token each, replayed, give what they give eagerly.

As in `test_graphs.py` a capture on the CPU is the call itself; torch's attention over a block table, which it has on
CUDA alone, is computed there as it is documented.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lora_runtime.arena import ALayout, RankArena, SlotTable
from lora_runtime.batch import BASE_CARD, CachedRow, Resident, Row
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.kernels.grouped_lora.triton_backend.backend import TritonGroupedLora
from lora_runtime.kv_blocks import BlockCopy
from lora_runtime.model.base import BaseModel, PackedBackbone
from lora_runtime.model.buckets import GraphSettings
from lora_runtime.model.capture import CudaCapture
from lora_runtime.model.graphs import Eager, GraphedBackbone, GraphKey
from lora_runtime.model.kv_cache import KvCache, KvLayout
from lora_runtime.model.load import load_base
from lora_runtime.model.paged import PagedLayers
from lora_runtime.model.runner import PackedRunner
from lora_runtime.types import TokenSequence
from tests.conformance.families import FAMILIES, build_base
from tests.graph_capture import RecordingCapture
from tests.paged_attention import varlen_as_documented
from tests.resident_adapters import put_random_adapter

NUM_BLOCKS = 40
DEVICES = [("cpu", "float32", 4), pytest.param(("cuda", "bfloat16", 256), marks=pytest.mark.gpu)]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@dataclass
class Text:
    """One sequence: its tokens so far, and where they lie."""

    tokens: list[int]
    blocks: list[int]
    resident: Resident
    num_computed: int = 0


class Rig:
    """A graphed and an eager runner, each over a KV cache of its own."""

    def __init__(
        self, folder: Path, place: tuple[str, str, int], *, decodes: tuple[int, ...] = (2, 4), runs: bool = False
    ) -> None:  # fmt: skip
        device, dtype, self.block_tokens = place
        self.tolerance = TOLERANCE[dtype]
        base: BaseModel = load_base(folder, prepack=False, device=device, dtype=dtype)
        self.base, where = base, base.placement.device
        self.arena = RankArena(1 << 21, base.placement.dtype, where)
        self.slots = SlotTable(len(base.spec.sites), base.spec.groups, 8, ALayout.RANK_ROWS)
        lora = TritonGroupedLora(self.arena, self.slots)
        assert isinstance(base.backbone, PackedBackbone)
        self.paged = [self._layers() for _ in range(2)]
        settings = GraphSettings(1 << 30, (16,), max_sequences=8, max_length=90, decodes=decodes)
        self.capture = CudaCapture(where) if device == "cuda" else RecordingCapture(runs=runs)
        self.graphs = GraphedBackbone(base.backbone, lora, self.slots, self.capture, settings, self.paged[0])
        self.graphed = PackedRunner(replace(base, backbone=self.graphs), self.slots, lora, self.paged[0])
        self.eager = PackedRunner(base, self.slots, ReferenceGroupedLora(self.arena), self.paged[1])
        self.random = random.Random(1)
        self.generator = torch.Generator().manual_seed(0)
        self.free = list(range(NUM_BLOCKS))
        self.random.shuffle(self.free)

    def _layers(self) -> PagedLayers:
        kv, placement = self.base.kv, self.base.placement
        assert kv is not None
        more: dict[str, Any] = {"layout": KvLayout.ROWS, "paged_attention": varlen_as_documented}
        if placement.device.type == "cuda":
            more = {}
        return PagedLayers(KvCache(kv, NUM_BLOCKS, self.block_tokens, placement.dtype, placement.device, **more))

    def add(self, rank: int, *names: str) -> Resident:
        chosen = {s.index for s in self.base.spec.sites if s.name.endswith(names)}
        return put_random_adapter(self.base.spec, self.arena, self.slots, rank, chosen, self.generator)

    def text(self, num_tokens: int, resident: Resident) -> Text:
        return Text([self.random.randrange(1, 300) for _ in range(num_tokens)], [], resident)

    def row(self, text: Text) -> Row:
        """All of its tokens that are not computed."""
        while len(text.blocks) * self.block_tokens < len(text.tokens):
            text.blocks.append(self.free.pop())
        start, text.num_computed = text.num_computed, len(text.tokens)
        sequence = TokenSequence(tuple(text.tokens[start:]), None)
        return Row(sequence, text.resident, cached=CachedRow(start, list(text.blocks)))

    def check(self, texts: list[Text], *, replayed: bool) -> torch.Tensor:
        rows = [self.row(text) for text in texts]
        before = self.graphs.stats.replayed
        found, want = self.graphed.hidden_states(rows).float(), self.eager.hidden_states(rows).float()
        assert (self.graphs.stats.replayed - before) == replayed
        assert found.isfinite().all()
        if self.base.placement.dtype is torch.float32:
            torch.testing.assert_close(found, want, atol=self.tolerance * float(want.abs().max()), rtol=0)
        else:  # each value is rounded in every layer: single ones may be farther off than all together
            assert (found - want).norm() / want.norm() < self.tolerance
            torch.testing.assert_close(found, want, atol=2 * self.tolerance * float(want.abs().max()), rtol=0)
        return found

    def go_on(self, texts: list[Text]) -> None:
        for text in texts:
            text.tokens.append(self.random.randrange(1, 300))


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(request.param, tmp_path_factory.mktemp("bases")).folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base("llama", tmp_path_factory.mktemp("bases")).folder


def attention_of(folder: Path) -> tuple[str, ...]:
    return FAMILIES[folder.name].attention


@pytest.mark.parametrize("place", DEVICES)
def test_texts_of_many_adapters_go_on_by_replays_as_they_do_eagerly(folder: Path, place: tuple[str, str, int]) -> None:
    rig = Rig(folder, place)
    one = rig.add(4, *attention_of(folder))
    rig.graphed.warm_up() if place[0] == "cuda" else rig.graphs.capture()
    two, none = rig.add(8, *attention_of(folder)), replace(one, slot=-1)
    texts = [rig.text(n, who) for n, who in ((5, one), (9, one), (1, two), (14, none))]
    rig.check(texts[:3], replayed=False)
    rig.check(texts[3:], replayed=False)
    for step in range(6):  # over the border of a block, in a full bucket and in one that is filled up
        active = texts if step % 2 else texts[1:]
        rig.go_on(active)
        rig.check(active, replayed=True)
    assert rig.graphs.stats.eager == {Eager.CACHED: 2}


def test_what_fills_a_bucket_up_touches_no_block_that_is_given_out(llama: Path) -> None:
    rig = Rig(llama, ("cpu", "float32", 4), decodes=(4,), runs=True)
    one = rig.add(4, "q_proj")
    rig.graphs.capture()
    text = rig.text(6, one)
    rig.check([text], replayed=False)
    stores = [rig.paged[0].cache._store.layer(layer) for layer in range(2)]
    given = [[t[:NUM_BLOCKS].clone() for t in store] for store in stores]
    rig.go_on([text])
    rig.check([text], replayed=True)
    for store, before in zip(stores, given, strict=True):
        for now, then in zip(store, before, strict=True):
            changed = (now[:NUM_BLOCKS] != then).flatten(2).any(-1).nonzero().tolist()
            assert changed == [[text.blocks[1], 2]], "the text's seventh token is all that was written"


def test_a_block_that_was_copied_is_read_by_the_next_replay(llama: Path) -> None:
    rig = Rig(llama, ("cpu", "float32", 4))
    one = rig.add(4, "q_proj")
    rig.graphs.capture()
    text = rig.text(6, one)
    rig.check([text], replayed=False)
    twin = Text([*text.tokens], [text.blocks[0], rig.free.pop()], one, text.num_computed)
    for runner in (rig.graphed, rig.eager):
        runner.copy_blocks([BlockCopy(text.blocks[1], twin.blocks[1])])
    rig.go_on([text, twin])
    rig.check([text, twin], replayed=True)
    assert text.tokens != twin.tokens


@pytest.mark.parametrize("case", ["whole sequences beside", "two tokens of a text", "too many texts", "an aLoRA"])
def test_other_steps_run_eagerly_and_are_counted(llama: Path, case: str) -> None:
    rig = Rig(llama, ("cpu", "float32", 4), decodes=(2,))
    one = rig.add(4, "q_proj")
    if case == "an aLoRA":
        one = replace(one, card=replace(BASE_CARD, invocation_tokens=(7, 8)))
    rig.graphs.capture()
    texts = [rig.text(3, one) for _ in range(3)]
    rig.check(texts, replayed=False)
    rig.graphs.stats.eager.clear()
    rig.go_on(texts)
    rows = [rig.row(text) for text in (texts if case == "too many texts" else texts[:2])]
    if case == "whole sequences beside":
        rows.append(Row(TokenSequence((5, 6), None), one))
    if case == "two tokens of a text":
        rig.go_on([texts[2]])
        rows.append(rig.row(texts[2]))
    found, want = rig.graphed.hidden_states(rows), rig.eager.hidden_states(rows)
    torch.testing.assert_close(found, want, atol=2e-5 * float(want.abs().max()), rtol=0)
    reason = {"too many texts": Eager.SIZE, "an aLoRA": Eager.EXTRAS}.get(case, Eager.CACHED)
    assert rig.graphs.stats.eager == {reason: 1}


def test_contexts_longer_than_a_graph_lists_blocks_for_run_eagerly(llama: Path) -> None:
    rig = Rig(llama, ("cpu", "float32", 4))
    rig.graphs.capture()
    decodes = rig.graphs._decodes[0].decodes
    assert decodes is not None and decodes.num_columns == 23, "90 tokens in blocks of 4"
    row = Row(TokenSequence((5,), None), cached=CachedRow(91, list(range(23))))
    assert rig.graphs._choose([row]) is not Eager.SIZE
    assert rig.graphs._choose([replace(row, cached=CachedRow(92, list(range(24))))]) is Eager.SIZE


def test_a_base_with_a_softcap_has_no_graphs_of_texts_that_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = replace(
        FAMILIES["gemma3"], model_class="Gemma2ForCausalLM",
        config={**FAMILIES["gemma3"].config, "attn_logit_softcapping": 5.0},
    )  # fmt: skip
    rig = Rig(build_base("gemma2", tmp_path, family).folder, ("cpu", "float32", 4), runs=True)
    one = rig.add(4, "q_proj")
    rig.graphs.capture()
    assert rig.graphs.captured and not any(key.continues for key in rig.graphs.captured)
    assert caplog.text.count("that continue sequences cannot be captured and run eagerly: attention with a soft") == 1
    text = rig.text(3, one)
    rig.check([text], replayed=False)
    rig.go_on([text])
    rig.check([text], replayed=False)


def test_graphs_of_both_kinds_are_captured_and_told_apart(llama: Path) -> None:
    rig = Rig(llama, ("cpu", "float32", 4))
    rig.add(4, "q_proj")
    rig.graphs.capture()
    sizes = {(key.num_tokens, key.continues) for key in rig.graphs.captured}
    assert sizes == {(16, False), (2, True), (4, True)}
    variants = {key.variant for key in rig.graphs.captured}
    assert rig.graphs.captured == {GraphKey(n, v, c) for n, c in sizes for v in variants}
