"""Projections that are fused into one product compute the same, with adapters too, and take no more memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import Row
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.model.base import BaseModel
from lora_runtime.model.fuse import fuse_linears, unfuse_linears
from lora_runtime.model.load import _check_placed, load_base
from lora_runtime.model.runner import PackedRunner
from lora_runtime.types import TokenSequence
from tests.resident_adapters import put_random_adapter

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52}
FUSED = {
    "bert": {"query", "key", "value"},
    "gpt2": set(),
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
}


def made(name: str, vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2Model(GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    config = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    return LlamaForCausalLM(config)


@pytest.fixture
def base(request: pytest.FixtureRequest, tiny_bert: Path, tmp_path: Path) -> tuple[str, BaseModel]:
    name: str = request.param
    if name == "bert":
        return name, load_base(tiny_bert, prepack=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    made(name, len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return name, load_base(tmp_path, prepack=False)


def hidden(base: BaseModel) -> torch.Tensor:
    """Of rows of two adapters at all sites and of the base."""
    arena, slots = RankArena(1 << 20), SlotTable(len(base.spec.sites), base.spec.groups, num_slots=4)
    generator = torch.Generator().manual_seed(0)
    sites = [site.index for site in base.spec.sites if not site.per_sequence]
    one, two = (put_random_adapter(base.spec, arena, slots, 4, sites, generator) for _ in range(2))
    sequences = [TokenSequence(tuple(range(9, 9 + n)), None) for n in (5, 7, 3)]
    rows = [Row(sequences[0], one), Row(sequences[1], two), Row(sequences[2])]
    return PackedRunner(base, slots, ReferenceGroupedLora(arena)).hidden_states(rows)


@pytest.mark.parametrize("base", FUSED, indirect=True)
def test_fused_projections_compute_the_same(base: tuple[str, BaseModel]) -> None:
    name, model = base
    backbone = model.backbone.inputs.module
    before, num_bytes = hidden(model), storage_bytes(backbone)
    fused = fuse_linears(backbone)
    assert {linear.path.rpartition(".")[2] for linear in fused} == FUSED[name]
    assert len(fused) == 2 * len(FUSED[name])
    torch.testing.assert_close(hidden(model), before, atol=1e-5 * float(before.abs().max()), rtol=0)
    assert storage_bytes(backbone) == num_bytes
    unfuse_linears(fused)
    torch.testing.assert_close(hidden(model), before, atol=1e-5 * float(before.abs().max()), rtol=0)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_fused_group_is_one_product(base: tuple[str, BaseModel], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (calls.append(self.out_features), forward(self, x))[1])
    fuse_linears(base[1].backbone.inputs.module)
    hidden(base[1])
    assert calls == [32, 32] * 2, "the output and down projections of two layers are alone"


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_linears_of_which_one_has_no_bias_are_left_alone(base: tuple[str, BaseModel]) -> None:
    backbone = base[1].backbone.inputs.module
    backbone.get_submodule("encoder.layer.0.attention.self.key").base.bias = None
    assert {linear.path.split(".")[2] for linear in fuse_linears(backbone)} == {"1"}


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_an_architecture_that_cannot_take_slices_keeps_its_own(
    base: tuple[str, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = base[1].backbone.inputs.module
    linear = backbone.get_submodule("encoder.layer.0.attention.self.query")
    forward = type(backbone).forward

    def picky(self: nn.Module, *args: object, **kwargs: object) -> object:
        if linear.prepacked is not None:
            raise RuntimeError("view size is not compatible with input tensor's size and stride")
        return forward(self, *args, **kwargs)

    checks: list[torch.Tensor] = []
    _check_placed(lambda: checks.append(hidden(base[1])), backbone, fuse=True)
    assert linear.prepacked is not None
    monkeypatch.setattr(type(backbone), "forward", picky)
    _check_placed(lambda: checks.append(hidden(base[1])), backbone, fuse=True)
    assert linear.prepacked is None
    assert len(checks) == 2 and torch.allclose(*checks, atol=1e-4)
    with pytest.raises(RuntimeError, match="of its own"):
        _check_placed(lambda: (_ for _ in ()).throw(RuntimeError("of its own")), backbone, fuse=False)


def storage_bytes(module: nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())
