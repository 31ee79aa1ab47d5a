"""Captured forward passes, replayed for other batches, give what the same batches give eagerly.

On the CPU a capture is the call itself, made again on the same tensors, and Triton's kernels run in its interpreter:
all but CUDA's own part is what serves. Tests marked `gpu` do the same with CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from transformers import GPT2Config, GPT2Model

from lora_runtime.arena import ALayout, RankArena, SlotTable
from lora_runtime.batch import BASE_CARD, Extras, Resident, Row
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.kernels.grouped_lora.triton_backend import backend as backend_module
from lora_runtime.kernels.grouped_lora.triton_backend.backend import TritonGroupedLora
from lora_runtime.kernels.grouped_lora.triton_backend.kernels import shrink_kernel
from lora_runtime.model.base import BaseModel, PackedBackbone
from lora_runtime.model.buckets import GraphSettings
from lora_runtime.model.capture import CudaCapture
from lora_runtime.model.graphs import NO_LORA, Eager, GraphedBackbone, GraphKey, Variant
from lora_runtime.model.load import load_base
from lora_runtime.model.runner import PackedRunner
from lora_runtime.types import Site, TokenSequence
from tests.graph_capture import RecordingCapture
from tests.resident_adapters import put_random_adapter

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Rig:
    """A base, a graphed and an eager runner over one arena, and adapters put there by hand."""

    base: BaseModel
    arena: RankArena
    slots: SlotTable
    graphs: GraphedBackbone
    capture: RecordingCapture | CudaCapture
    graphed: PackedRunner
    eager: PackedRunner
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @classmethod
    def make(
        cls, folder: Path, device: str, *, num_slots: int = 8, num_bytes: int = 1 << 30,
        buckets: tuple[int, ...] = (16, 32), max_length: int = 30, **capture: Any,
    ) -> Rig:  # fmt: skip
        base = load_base(folder, prepack=False, device=device)
        place = base.placement.device
        arena = RankArena(1 << 21, device=place)
        slots = SlotTable(len(base.spec.sites), base.spec.groups, num_slots, ALayout.RANK_ROWS)
        lora = TritonGroupedLora(arena, slots)
        assert isinstance(base.backbone, PackedBackbone)
        settings = GraphSettings(num_bytes, buckets, max_sequences=3, max_length=max_length)
        recorder = CudaCapture(place) if device == "cuda" else RecordingCapture(**capture)
        graphs = GraphedBackbone(base.backbone, lora, slots, recorder, settings)
        graphed = PackedRunner(replace(base, backbone=graphs), slots, lora)
        eager = PackedRunner(base, slots, ReferenceGroupedLora(arena))
        return cls(base, arena, slots, graphs, recorder, graphed, eager)

    def sites(self, *names: str) -> list[Site]:
        return [s for s in self.base.spec.sites if s.name.endswith(names) and not s.per_sequence]

    def add(self, rank: int, *names: str) -> Resident:
        """An adapter of random matrices at the sites whose names end so."""
        chosen = {site.index for site in self.sites(*names)}
        return put_random_adapter(self.base.spec, self.arena, self.slots, rank, chosen, self.generator)

    def row(self, num_tokens: int, resident: Resident | None = None) -> Row:
        ids = torch.randint(5, 200, (num_tokens,), generator=self.generator).tolist()
        sequence = TokenSequence(tuple(ids), None)
        return Row(sequence) if resident is None else Row(sequence, resident)

    def check(self, rows: list[Row], *, replayed: bool = True) -> list[torch.Tensor]:
        before = self.graphs.stats.replayed
        found, want = self.graphed.run(rows), self.eager.run(rows)
        assert (self.graphs.stats.replayed - before) == replayed
        for got, exact in zip(found, want, strict=True):
            torch.testing.assert_close(got, exact, atol=2e-5 * float(exact.abs().max()), rtol=0)
        return found


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bases") / "tiny-gpt2"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=4, initializer_range=0.2, pad_token_id=0
    )
    GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", DEVICES)
def test_captured_with_one_adapter_and_replayed_with_many_none_and_many_again(tiny_bert: Path, device: str) -> None:
    rig = Rig.make(tiny_bert, device)
    one = rig.add(4, "query", "value")
    rig.graphed.warm_up() if device == "cuda" else rig.graphs.capture()
    qv = rig.add(8, "query", "value")
    compiled = rig.graphed.stats().num_compiled
    alone = rig.check([rig.row(7, one)])
    with_lora = rig.row(6, one)
    mixed = rig.check([with_lora, rig.row(3, qv), rig.row(5)])
    assert (rig.eager.run([Row(with_lora.sequence)])[0] - mixed[0]).norm() > 0.1 * mixed[0].norm(), "LoRA is invisible"
    rig.check([rig.row(6), rig.row(8)])
    rig.check([rig.row(6, qv), rig.row(1, one), rig.row(20)])
    rig.slots.release(one.slot)
    again = rig.add(4, "query", "value")
    assert again.slot == one.slot
    rig.check([rig.row(7, qv), rig.row(7, again)])
    assert alone[0].isfinite().all() and not rig.graphs.stats.eager
    assert rig.graphed.stats().num_compiled == compiled, "a kernel was compiled after the warm-up"


@pytest.mark.parametrize("device", DEVICES)
def test_a_decoder_whose_tokens_see_only_what_precedes_them(tiny_gpt2: Path, device: str) -> None:
    rig = Rig.make(tiny_gpt2, device)
    one, two = rig.add(4, "c_attn"), rig.add(4, "c_attn")
    rig.graphs.capture()
    rig.check([rig.row(5, one), rig.row(4), rig.row(7, two)])
    rig.check([rig.row(9), rig.row(9, two)])
    assert not rig.graphs.stats.eager


def test_a_row_alone_and_in_a_full_bucket_give_the_same(tiny_bert: Path) -> None:
    rig = Rig.make(tiny_bert, "cpu")
    one = rig.add(4, "query", "value")
    rig.graphs.capture()
    row = rig.row(6, one)
    alone, beside = rig.graphed.run([row])[0], rig.graphed.run([row, rig.row(10)])[0]
    torch.testing.assert_close(alone, beside, atol=1e-5 * float(alone.abs().max()), rtol=0)


@dataclass
class Launches:
    """Which groups' shrinks were launched."""

    groups: list[int] = field(default_factory=list[int])

    def __call__(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            if kernel is shrink_kernel:
                self.groups.append(args[8])
            kernel[grid](*args, **constants)

        return launch


def test_traffic_launches_nothing_where_its_adapters_have_nothing(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig.make(tiny_bert, "cpu")
    attention, everywhere = rig.add(4, "query", "value"), rig.add(4, "query", "value", "intermediate.dense")
    rig.graphs.capture()
    launches = Launches()
    monkeypatch.setattr(backend_module, "_launch", launches)
    groups = {name: {site.group for site in rig.sites(name)} for name in ("query", "intermediate.dense")}
    rig.check([rig.row(5), rig.row(3)])
    assert launches.groups == []
    rig.check([rig.row(5, attention), rig.row(3)])
    assert sorted(launches.groups) == sorted(groups["query"])
    launches.groups.clear()
    rig.check([rig.row(5, everywhere), rig.row(3, attention)])
    assert sorted(launches.groups) == sorted(groups["query"] | groups["intermediate.dense"])


def test_what_is_captured_is_what_the_adapters_need_the_most_common_first(tiny_bert: Path) -> None:
    rig = Rig.make(tiny_bert, "cpu", bytes_each=10, num_bytes=55)
    rig.add(3, "value"), rig.add(8, "intermediate.dense"), rig.add(6, "query")
    qv, mlp = (frozenset(s.group for s in rig.sites(name)) for name in ("value", "intermediate.dense"))
    wanted = [NO_LORA, Variant(qv, 8), Variant(mlp, 8), Variant(qv | mlp, 8)]
    assert rig.graphs._wanted()[:4] == wanted
    assert rig.graphs._wanted()[4] == Variant(frozenset(s.group for s in rig.base.spec.sites if not s.per_sequence), 16)
    assert rig.graphs.capture() == 5, "55 bytes hold five graphs"
    assert rig.graphs.captured == {GraphKey(n, v) for v in wanted[:2] for n in (16, 32)} | {
        GraphKey(32, Variant(mlp, 8))
    }
    assert rig.graphed.stats().graph_bytes == 50
    rig.check([rig.row(4, rig.add(2, "intermediate.dense"))], replayed=False)
    assert rig.graphed.stats().eager_steps == {"extras": 0, "size": 0, "cached": 0, "variant": 1}


def test_a_wider_variant_serves_and_a_narrower_never(tiny_bert: Path) -> None:
    rig = Rig.make(tiny_bert, "cpu")
    rig.add(4, "query")
    rig.graphs.capture()
    rig.check([rig.row(4, rig.add(12, "intermediate.dense"))])  # by the graph of all groups
    rig.check([rig.row(4, rig.add(17, "query"))], replayed=False)
    assert rig.graphs.stats.eager == {Eager.VARIANT: 1}


def test_a_slot_that_another_adapter_took_is_looked_at_again(tiny_bert: Path) -> None:
    rig = Rig.make(tiny_bert, "cpu")
    one = rig.add(4, "query")
    rig.graphs.capture()
    rig.check([rig.row(4, one)])
    rig.slots.release(one.slot)
    other = rig.add(17, "query")
    assert other.slot == one.slot
    rig.check([rig.row(4, other)], replayed=False)
    assert rig.graphs.stats.eager == {Eager.VARIANT: 1}


@pytest.mark.parametrize("lengths", [(20, 13), (5, 4, 3, 2, *[1] * 14)])
def test_a_batch_larger_than_every_bucket_runs_eagerly_and_is_counted(
    tiny_bert: Path, lengths: tuple[int, ...]
) -> None:
    rig = Rig.make(tiny_bert, "cpu")
    one = rig.add(4, "query")
    rig.graphs.capture()
    rig.check([rig.row(n, one) for n in lengths], replayed=False)
    assert rig.graphs.stats.eager == {Eager.SIZE: 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"extras": {"encoder.layer.0.attention.self.query": Extras(shift=torch.full((36,), 0.5))}},
        {"card": replace(BASE_CARD, invocation_tokens=(7, 8))},
    ],
)
def test_adapters_that_change_more_than_graphs_hold_run_eagerly(tiny_bert: Path, changes: dict[str, Any]) -> None:
    rig = Rig.make(tiny_bert, "cpu")
    one = replace(rig.add(4, "query"), **changes)
    rig.graphs.capture()
    rig.check([rig.row(4, one), rig.row(3)], replayed=False)
    rig.check([rig.row(3)])
    assert rig.graphs.stats.eager == {Eager.EXTRAS: 1}


def test_more_slots_than_the_device_has_room_for_are_captured_again(tiny_bert: Path) -> None:
    rig = Rig.make(tiny_bert, "cpu", num_slots=2)
    adapters = [rig.add(4, "query")]
    rig.graphs.capture()
    assert isinstance(rig.capture, RecordingCapture)
    before, captured = rig.capture.count, rig.graphs.captured
    adapters += [rig.add(4, "query") for _ in range(6)]
    rig.check([rig.row(3, adapters[0]), rig.row(3, adapters[-1])])
    with_lora = [key for key in captured if key.variant.groups]
    assert rig.graphs.captured == captured
    assert rig.capture.count == before + len(with_lora) > before
    rig.check([rig.row(4, adapters[3]), rig.row(5)])
    assert rig.capture.count == before + len(with_lora)


def test_a_base_that_cannot_be_captured_runs_eagerly_and_says_so(
    tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig.make(tiny_bert, "cpu", fails=True)
    assert rig.graphs.capture() == 0
    assert "run eagerly: operation not permitted when stream is capturing" in caplog.text
    rig.check([rig.row(4, rig.add(4, "query"))], replayed=False)
    assert rig.graphed.stats().num_graphs == 0


def test_a_sequence_longer_than_attention_was_captured_for_takes_no_graph(tiny_bert: Path) -> None:
    rig = Rig.make(tiny_bert, "cpu", buckets=(128,), max_length=70)
    rig.graphs.capture()
    found = [rig.graphs._choose([rig.row(n)]) for n in (70, 71)]
    assert found[0] != Eager.SIZE and found[1] is Eager.SIZE


def test_buckets_double_up_to_the_budget() -> None:
    assert GraphSettings.usual(1, 256, 8, 512).buckets == (16, 32, 64, 128, 256)
    assert GraphSettings.usual(1, 100, 8, 512).buckets == (16, 32, 64, 100)
    assert GraphSettings.usual(1, 8, 8, 512).buckets == (16,)
    assert GraphSettings.usual(1, 8, 8, 512).decodes == ()
    assert GraphSettings.usual(1, 8, 8, 512, 24).decodes == (1, 2, 4, 8, 16, 24)


def test_nothing_is_compiled_by_backends_that_compile_nothing(tiny_bert: Path) -> None:
    rig = Rig.make(tiny_bert, "cpu")
    rig.eager.warm_up()
    assert rig.eager.stats().num_compiled == 0
