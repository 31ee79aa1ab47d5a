"""Compression of PEFT's own adapters: the error is the least that a rank allows, and PEFT and the server agree."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_runtime.adapters.digests import file_digests
from lora_runtime.adapters.metadata import AdapterMetadata, read_metadata
from lora_runtime.errors import AdapterRejected
from lora_runtime.runtime import Runtime
from lora_runtime.svd.compress import CompressReport, compress_adapter
from lora_runtime.svd.settings import CompressSettings, FactorDtype, RankRule
from lora_runtime.types import Task
from tests.svd_models import FAMILIES, Pair, outputs_of, relative

WEIGHTS = "adapter_model.safetensors"
TARGETS = {"bert": ["query", "value", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"], "llama-tied": ["q_proj"]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bert", {}),
    "rslora": ("bert", {"use_rslora": True}),
    "patterns": ("bert", {"rank_pattern": {"value": 12}, "alpha_pattern": {"layer.1.*query": 3}}),
    "bias": ("bert", {"lora_bias": True, "bias": "none"}),
    "conv1d": ("gpt2", {"fan_in_fan_out": True}),
    "embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    for family in TARGETS:
        folder = tmp_path_factory.mktemp(family)
        base_class, config, _, _ = FAMILIES[family]
        torch.manual_seed(0)
        base_class.from_config(config).save_pretrained(folder)
        found[family] = Pair(family, folder, folder)
    return found


def make(base: Pair, folder: Path, **options: Any) -> Path:
    """Save a random adapter of rank 8 whose pairs of factors have a falling spectrum."""
    torch.manual_seed(1)
    task = {AutoModelForSequenceClassification: "SEQ_CLS", AutoModelForCausalLM: "CAUSAL_LM"}[base.task_class]
    config = LoraConfig(
        **{"task_type": task, "r": 8, "lora_alpha": 12, "target_modules": TARGETS[base.family]} | options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base.load_base(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    falling = 0.6 ** torch.arange(max(parameter.shape[:1])) if "lora_A" in name else torch.ones(1)
                    scale = falling[:, None] if parameter.dim() == 2 and "lora_A" in name else 1.0
                    parameter.copy_(0.3 * torch.randn_like(parameter) * scale)
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def compress(adapter: Path, out: Path, ranks: RankRule, **options: Any) -> CompressReport:
    return compress_adapter(CompressSettings(adapter, out, ranks, **options))


def deltas(base: Pair, adapter: Path) -> dict[str, np.ndarray[Any, Any]]:
    """PEFT's own product of each pair of factors, by module path."""
    modules: Any = base.load_peft(adapter).get_base_model().named_modules()
    return {
        path: module.get_delta_weight("default").detach().double().numpy()
        for path, module in modules
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_error_is_the_least_that_the_rank_allows(bases: dict[str, Pair], tmp_path: Path, variant: str) -> None:
    family, options = VARIANTS[variant]
    base = bases[family]
    report = compress(make(base, tmp_path / "old", **options), tmp_path / "new", RankRule(rank=3))
    before, after = deltas(base, tmp_path / "old"), deltas(base, tmp_path / "new")
    assert {site.name for site in report.sites} == before.keys() == after.keys()
    for site in report.sites:
        squares = np.linalg.svd(before[site.name], compute_uv=False) ** 2
        best = (squares[3:].sum() / squares.sum()) ** 0.5  # Eckart and Young
        lost = np.linalg.norm(before[site.name] - after[site.name]) / squares.sum() ** 0.5
        assert best > 0.01
        assert lost == pytest.approx(best, rel=1e-3)
        assert site.error == pytest.approx(best, rel=1e-4)
        assert site.energy == pytest.approx(squares[:3].sum() / squares.sum(), rel=1e-6)
        assert (site.rank, site.norm) == (3, pytest.approx(squares.sum() ** 0.5, rel=1e-5))
        assert site.old_rank == (12 if variant == "patterns" and "value" in site.name else 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_of_the_energy_is_the_same_adapter_in_fewer_ranks(
    bases: dict[str, Pair], tmp_path: Path, variant: str
) -> None:
    """Of factors that repeat themselves, and with everything beside them."""
    family, options = VARIANTS[variant]
    base = bases[family]
    make(base, tmp_path / "old", **options)
    tensors = load_file(tmp_path / "old" / WEIGHTS)
    for key, tensor in tensors.items():
        if key.endswith(("lora_A.weight", "lora_embedding_A")):
            tensor[1::2] = 2 * tensor[::2]
    save_file(tensors, tmp_path / "old" / WEIGHTS, {"format": "pt"})
    report = compress(tmp_path / "old", tmp_path / "new", RankRule(energy=1.0))
    assert {site.rank for site in report.sites} <= {4, 6}
    assert report.summary.error < 1e-6
    want, found = (outputs_of(base.load_peft(tmp_path / name)) for name in ("old", "new"))
    assert relative(outputs_of(base.load_base()), want) > 0.01
    assert relative(found, want) < 1e-5


def test_the_server_answers_as_peft_does(tmp_path: Path, tiny_bert: Path) -> None:
    base = Pair("bert", tiny_bert, tiny_bert)
    make(base, tmp_path / "old", rank_pattern={"value": 12})
    compress(tmp_path / "old", tmp_path / "new", RankRule(energy=0.8))
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    model = base.load_peft(tmp_path / "new")
    with Runtime(tiny_bert) as runtime:
        encoder = runtime.encoder_for(runtime.load(tmp_path / "new"))
        (prediction,) = runtime.classify("new", ["cat dog horse"])
        (sequence,) = encoder.encode([("cat dog horse", None)], max_length=None, truncate=False)
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].softmax(0)
    assert torch.tensor(list(prediction.scores.values())) == pytest.approx(want, abs=1e-5)


def test_sites_of_no_higher_rank_stay_bit_for_bit(bases: dict[str, Pair], tmp_path: Path) -> None:
    make(bases["bert"], tmp_path / "old", rank_pattern={"value": 2}, use_rslora=True)
    report = compress(tmp_path / "old", tmp_path / "new", RankRule(rank=2))
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("old", "new"))
    for key, tensor in old.items():
        if ".value." in key or "classifier" in key:
            assert torch.equal(new[key], tensor)
    stayed = {site.name for site in report.sites if site.error == 0}
    assert stayed == {site.name for site in report.sites if "value" in site.name}
    assert report.summary.num_unchanged == len(stayed) == 2
    before, after = (deltas(bases["bert"], tmp_path / name) for name in ("old", "new"))
    assert all(np.array_equal(before[name], after[name]) for name in stayed)


def test_everything_else_goes_along_but_for_what_was_measured(bases: dict[str, Pair], tmp_path: Path) -> None:
    make(bases["bert"], tmp_path / "old")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    (tmp_path / "old" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "old" / "1_Pooling").mkdir()
    (tmp_path / "old" / "1_Pooling" / "config.json").write_text("{}")
    names = ("adapter_config.json", WEIGHTS)
    given = AdapterMetadata(
        task=Task.CLASSIFY, labels=("a", "b", "c"), max_length=64, metrics={"accuracy": 0.9},
        digests=file_digests(tmp_path / "old", names),
    )  # fmt: skip
    given.write(tmp_path / "old")
    compress(tmp_path / "old", tmp_path / "new", RankRule(rank=2))
    digests = file_digests(tmp_path / "new", names)
    assert read_metadata(tmp_path / "new") == given.model_copy(update={"digests": digests, "metrics": {}})
    kept = {"tokenizer.json", "1_Pooling", "README.md", "multilora.json", *names}
    assert {path.name for path in (tmp_path / "new").iterdir()} == kept
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("old", "new"))
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items() if "lora_" not in key)


def test_factors_keep_their_dtype_unless_another_is_asked_for(bases: dict[str, Pair], tmp_path: Path) -> None:
    make(bases["bert"], tmp_path / "old")
    tensors = {key: t.half() if "lora_" in key else t for key, t in load_file(tmp_path / "old" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "old" / WEIGHTS, {"format": "pt"})
    for name, dtype, want in (("new", None, torch.float16), ("other", FactorDtype.BFLOAT16, torch.bfloat16)):
        compress(tmp_path / "old", tmp_path / name, RankRule(rank=2), dtype=dtype)
        found = load_file(tmp_path / name / WEIGHTS)
        assert {t.dtype for key, t in found.items() if "lora_" in key} == {want}
        assert {t.dtype for key, t in found.items() if "lora_" not in key} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "use_dora: DoRA cannot be compressed: its magnitudes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: PiSSA and OLoRA, unconverted cannot be compressed"),
    ],
)
def test_adapters_that_are_more_than_ba_are_refused(
    bases: dict[str, Pair], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    make(bases["bert"], tmp_path / "old", **options)
    with pytest.raises(AdapterRejected, match=says):
        compress(tmp_path / "old", tmp_path / "out" / "new", RankRule(rank=2))
    assert not list((tmp_path / "out").iterdir())


def test_an_untrained_adapter_keeps_one_rank_of_zeros(bases: dict[str, Pair], tmp_path: Path) -> None:
    make(bases["bert"], tmp_path / "old")
    tensors = load_file(tmp_path / "old" / WEIGHTS)
    save_file({k: t * ("lora_B" not in k) for k, t in tensors.items()}, tmp_path / "old" / WEIGHTS, {"format": "pt"})
    report = compress(tmp_path / "old", tmp_path / "new", RankRule(rank=4))
    assert {(site.rank, site.error, site.energy) for site in report.sites} == {(1, 0.0, 1.0)}
    assert all(not delta.any() for delta in deltas(bases["bert"], tmp_path / "new").values())


def test_a_damaged_adapter_is_refused_by_tensor(bases: dict[str, Pair], tmp_path: Path) -> None:
    make(bases["bert"], tmp_path / "old")
    tensors = load_file(tmp_path / "old" / WEIGHTS)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, tmp_path / "old" / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterRejected, match=f"tensor {key}: has a NaN"):
        compress(tmp_path / "old", tmp_path / "new", RankRule(rank=2))
