"""Extraction from tiny models: PEFT on the clean base gives the tuned model's own outputs, and so does the server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from lora_runtime.adapters.digests import file_digests
from lora_runtime.adapters.fingerprint import fingerprint_base
from lora_runtime.adapters.metadata import read_metadata
from lora_runtime.errors import CheckpointRejected, InvalidRequest
from lora_runtime.runtime import Runtime
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.svd.extract import ExtractReport, extract_adapter
from lora_runtime.svd.settings import ExtractSettings, FactorDtype, RankRule
from lora_runtime.types import Pooling, ProblemType, Task
from tests.svd_models import FAMILIES, Pair, make_pair, outputs_of, relative

FULL = RankRule(energy=1.0)
WEIGHTS = "adapter_model.safetensors"
TEXTS = ["cat dog horse", "red green blue cat dog cow", "iron"]


def extract(pair: Pair, out: Path, ranks: RankRule = FULL, **options: Any) -> ExtractReport:
    return extract_adapter(ExtractSettings(pair.base, pair.tuned, out, ranks, **options))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A pair of each family, made once and not to be changed."""
    return cache(lambda family: make_pair(tmp_path_factory.mktemp(family), family))


@pytest.fixture
def pair(pairs: Callable[[str], Pair], tmp_path: Path) -> Pair:
    """A BERT and its tuned classifier, to be spoiled."""
    known = pairs("bert")
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (known.base, known.tuned)]
    return Pair("bert", *folders)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma"])
def test_at_full_rank_peft_gives_the_tuned_models_own_outputs(
    pairs: Callable[[str], Pair], tmp_path: Path, family: str
) -> None:
    pair = pairs(family)
    report = extract(pair, tmp_path / "adapter")
    want, base = outputs_of(pair.load_tuned()), outputs_of(pair.load_base())
    assert relative(base, want) > 0.05
    assert relative(outputs_of(pair.load_peft(tmp_path / "adapter")), want) < 1e-5
    assert report.not_carried == ()
    assert report.summary.error < 1e-6


def parameters_of_peft(pair: Pair, adapter: Path) -> dict[str, torch.Tensor]:
    merged: Any = pair.load_peft(adapter).merge_and_unload()
    return dict(merged.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-untied"])
def test_at_full_rank_the_tuned_weights_come_back(pairs: Callable[[str], Pair], tmp_path: Path, family: str) -> None:
    pair = pairs(family)
    extract(pair, tmp_path / "adapter")
    found = parameters_of_peft(pair, tmp_path / "adapter")
    for name, want in pair.load_tuned().named_parameters():
        assert float((found[name] - want).detach().abs().max()) < 1e-5, name


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-untied"])
def test_at_a_lower_rank_each_site_keeps_what_numpys_svd_says(
    pairs: Callable[[str], Pair], tmp_path: Path, family: str
) -> None:
    pair = pairs(family)
    report = extract(pair, tmp_path / "adapter", RankRule(rank=3))
    base, tuned = (dict(m.named_parameters(remove_duplicate=False)) for m in (pair.load_base(), pair.load_tuned()))
    found = parameters_of_peft(pair, tmp_path / "adapter")
    assert len(report.sites) > 8
    for site in report.sites:
        name = f"{site.name}.weight"
        before, after, ours = (w[name].detach().double().numpy() for w in (base, tuned, found))
        squares = np.linalg.svd(after - before, compute_uv=False) ** 2
        best = (squares[3:].sum() / squares.sum()) ** 0.5
        assert site.energy == pytest.approx(squares[:3].sum() / squares.sum(), rel=1e-6)
        assert site.error == pytest.approx(best, rel=1e-4)
        assert np.linalg.norm(after - ours) / np.linalg.norm(after - before) == pytest.approx(best, rel=1e-3)
        assert site.relative_change == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-4)
        assert (site.rank, site.shape) == (3, after.shape)


def test_an_energy_gives_each_site_the_least_rank_that_keeps_it(pair: Pair, tmp_path: Path) -> None:
    with torch.no_grad():  # one site changes in a single direction
        tuned = pair.load_tuned()
        name = "bert.encoder.layer.1.output.dense.weight"
        weight, before = tuned.get_parameter(name), pair.load_base().get_parameter(name)
        weight.copy_(before + torch.outer(torch.randn(32), torch.randn(48)))
        tuned.save_pretrained(pair.tuned)
    report = extract(pair, tmp_path / "adapter", RankRule(energy=0.9))
    ranks = {site.name: site.rank for site in report.sites}
    assert ranks["bert.encoder.layer.1.output.dense"] == 1 < max(ranks.values())
    assert all(site.energy >= 0.9 for site in report.sites)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {tensors[f"base_model.model.{path}.lora_A.weight"].shape[0] for path in ranks if "layer" in path} == {
        ranks[path] for path in ranks if "layer" in path
    }
    modules: Any = dict(pair.load_peft(tmp_path / "adapter").get_base_model().named_modules())
    assert {modules[path].scaling["default"] for path in ranks} == {1.0}
    assert all(modules[path].r["default"] == rank for path, rank in ranks.items())


def test_unchanged_matrices_get_no_lora_and_their_layers_are_not_promised(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "bert", only="layer.1.attention.self.query.weight")
    report = extract(pair, tmp_path / "adapter", RankRule(rank=2))
    assert [site.name for site in report.sites] == ["bert.encoder.layer.1.attention.self.query"]
    assert report.summary.num_unchanged == 15
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter" / WEIGHTS)}
    query = "bert.encoder.layer.1.attention.self.query"
    assert keys == {f"{query}.lora_A.weight", f"{query}.lora_B.weight", "classifier.weight", "classifier.bias"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [query]
    with Runtime(pair.base) as runtime:
        runtime.load(tmp_path / "adapter")


@pytest.mark.parametrize("only", ["layer.0.attention.self.query", ".bias", "LayerNorm.bias"])
def test_changed_biases_are_carried_whatever_else_has_changed(tmp_path: Path, only: str) -> None:
    pair = make_pair(tmp_path, "bert", only=only)
    with torch.no_grad():
        tuned = pair.load_tuned()
        tuned.get_parameter("bert.encoder.layer.1.attention.self.value.weight").add_(0.1)
        tuned.save_pretrained(pair.tuned)
    report = extract(pair, tmp_path / "adapter")
    assert report.not_carried == ()
    assert relative(outputs_of(pair.load_peft(tmp_path / "adapter")), outputs_of(tuned)) < 1e-5
    if only == ".bias":
        with Runtime(pair.base) as runtime:
            assert_served_as(runtime, tmp_path / "adapter", tuned)


def assert_served_as(runtime: Runtime, adapter: Path, model: Any) -> None:
    """The server's scores, and the labels of the tuned config, on texts in one batch."""
    tokenizer = runtime.encoder_for(runtime.load(adapter))
    for text, prediction in zip(TEXTS, runtime.classify(adapter.name, TEXTS), strict=True):
        (sequence,) = tokenizer.encode([(text, None)], max_length=None, truncate=False)
        with torch.inference_mode():
            want = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].softmax(0)
        assert torch.tensor(list(prediction.scores.values())) == pytest.approx(want, abs=1e-5)
        assert list(prediction.scores) == [model.config.id2label[i] for i in range(len(want))]


@pytest.mark.parametrize("family", ["bert", "bert-mlm", "distilbert", "gpt2"])
def test_the_server_answers_as_peft(pairs: Callable[[str], Pair], tmp_path: Path, family: str) -> None:
    pair = pairs(family)
    with Runtime(pair.base) as runtime:
        for name, ranks in (("full", FULL), ("rank-4", RankRule(rank=4))):
            extract(pair, tmp_path / name, ranks)
            assert_served_as(runtime, tmp_path / name, pair.load_peft(tmp_path / name))


@pytest.mark.parametrize("family", ["gpt2-generate", "llama-tied", "llama-untied", "gemma"])
def test_the_server_generates_as_peft(pairs: Callable[[str], Pair], tmp_path: Path, family: str) -> None:
    pair = pairs(family)
    extract(pair, tmp_path / "adapter", RankRule(rank=4))
    model = pair.load_peft(tmp_path / "adapter")
    with Runtime(pair.base) as runtime:
        encoder = runtime.encoder_for(runtime.load(tmp_path / "adapter"))
        sampling = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
        ((sample,),) = runtime.generate("adapter", [TEXTS[1]], sampling)
        (sequence,) = encoder.encode([(TEXTS[1], None)], max_length=None, truncate=False)
    ids = list(sequence.input_ids)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert [token.token_id for token in sample.tokens] == ids[-6:]


def test_what_cannot_be_served_is_reported_with_its_size(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pairs("gemma")
    report = extract(pair, tmp_path / "adapter", RankRule(rank=4), targets=("q_proj", "v_proj"))
    left = {item.name: item for item in report.not_carried}
    assert "not computed token by token" in left["model.layers.0.self_attn.q_norm.weight"].reason
    change = left["model.layers.1.mlp.up_proj.weight"].relative_change
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = pair.load_base().get_parameter(name), pair.load_tuned().get_parameter(name)
    assert change == pytest.approx(float(((after - before).norm() / before.norm()).detach()), rel=1e-4)
    assert {site.kind for site in report.sites} == {"self_attn.q_proj", "self_attn.v_proj"}


def test_another_task_leaves_the_head_behind_and_says_so(pair: Pair, tmp_path: Path) -> None:
    (pair.tuned / "1_Pooling").mkdir()
    (pair.tuned / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    report = extract(pair, tmp_path / "adapter", task=Task.EMBED)
    assert {item.name for item in report.not_carried} == {"classifier.weight", "classifier.bias"}
    backbone = AutoModel.from_pretrained(pair.tuned).eval()
    want = outputs_of(backbone)
    as_embedder = Pair("bert-embed", pair.base, pair.tuned)
    assert relative(outputs_of(as_embedder.load_peft(tmp_path / "adapter")), want) < 1e-5
    metadata = read_metadata(tmp_path / "adapter")
    assert metadata is not None
    assert (metadata.task, metadata.pooling) == (Task.EMBED, Pooling.CLS)


def test_shards_are_read_on_both_sides(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama-untied", shard="1MB")
    assert len(list(pair.base.glob("model-*.safetensors"))) > 1
    assert len(list(pair.tuned.glob("model-*.safetensors"))) > 1
    extract(pair, tmp_path / "adapter")
    assert relative(outputs_of(pair.load_peft(tmp_path / "adapter")), outputs_of(pair.load_tuned())) < 1e-5


def test_an_output_layer_that_only_the_tuned_model_has_of_its_own(tmp_path: Path) -> None:
    """The base ties it to its embedding, as PEFT and the server go on doing."""
    pair = make_pair(tmp_path, "llama-tied")
    tuned = pair.load_tuned()
    tuned.config.tie_word_embeddings = False
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight + 0.05 * torch.randn(30522, 32))
    tuned.save_pretrained(pair.tuned)
    report = extract(pair, tmp_path / "adapter")
    assert "lm_head" in {site.name for site in report.sites}
    assert relative(outputs_of(pair.load_peft(tmp_path / "adapter")), outputs_of(pair.load_tuned())) < 1e-5


def test_names_of_early_checkpoints_are_understood(pair: Pair, tmp_path: Path) -> None:
    """BERT's norms were once gamma and beta, and a checkpoint may have the backbone's prefix or not."""
    early = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(pair.base / "model.safetensors")
    for new, old in early.items():
        tensors = {f"bert.{key.removeprefix('bert.').replace(new, old)}": value for key, value in tensors.items()}
    save_file(tensors, pair.base / "model.safetensors", {"format": "pt"})
    extract(pair, tmp_path / "adapter")
    assert relative(outputs_of(pair.load_peft(tmp_path / "adapter")), outputs_of(pair.load_tuned())) < 1e-5


def test_the_folder_says_what_serving_needs(pair: Pair, tmp_path: Path) -> None:
    config = json.loads((pair.tuned / "config.json").read_text())
    names = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "problem_type": "multi_label_classification"}
    (pair.tuned / "config.json").write_text(json.dumps(config | names))
    extract(pair, tmp_path / "adapter", RankRule(rank=2))
    metadata = read_metadata(tmp_path / "adapter")
    assert metadata is not None
    assert (metadata.task, metadata.problem_type) == (Task.CLASSIFY, ProblemType.MULTI_LABEL)
    assert (metadata.labels, metadata.pad_token_id) == (("no", "maybe", "yes"), 0)
    backbone = AutoModel.from_pretrained(pair.base)
    assert metadata.base == fingerprint_base(backbone, backbone.config)
    files = {"adapter_config.json", WEIGHTS, "multilora.json"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == files
    assert metadata.digests == file_digests(tmp_path / "adapter", files - {"multilora.json"})
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "adapter").glob("*.json"))


def test_half_precision_checkpoints_and_factors(pair: Pair, tmp_path: Path) -> None:
    for folder, model in ((pair.base, AutoModel.from_pretrained(pair.base)), (pair.tuned, pair.load_tuned())):
        model.to(torch.bfloat16).save_pretrained(folder)
    report = extract(pair, tmp_path / "adapter", dtype=FactorDtype.BFLOAT16)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 1e-4 < report.summary.error < 1e-2
    metadata, backbone = read_metadata(tmp_path / "adapter"), AutoModel.from_pretrained(pair.base)
    assert metadata is not None
    assert metadata.base == fingerprint_base(backbone, backbone.config)
    pair.load_tuned().float().save_pretrained(pair.tuned)
    assert "rounding counts as change" in extract(pair, tmp_path / "other", RankRule(rank=2)).notes[0]


def test_a_tokenizer_of_its_own_goes_along(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama-tied")
    for path in pair.base.glob("*token*"):
        shutil.copy(path, pair.tuned)
    (pair.tuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    extract(pair, tmp_path / "adapter", RankRule(rank=2))
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in (tmp_path / "adapter").iterdir()}
    (pair.tuned / "chat_template.jinja").unlink()
    extract(pair, tmp_path / "plain", RankRule(rank=2))
    assert not (tmp_path / "plain" / "tokenizer.json").exists()


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
FAULTS: dict[str, tuple[Any, str]] = {
    "a missing tensor": (lambda p: change(p.tuned, QUERY, None), f"tensor {QUERY}: is missing"),
    "one that the base lacks": (
        lambda p: change(p.base, QUERY.removeprefix("bert."), None), f"base .* tensor {QUERY}: is missing",
    ),
    "a shape": (lambda p: change(p.tuned, QUERY, torch.zeros(32, 31)), rf"{QUERY}: has shape \[32, 31\]"),
    "a NaN": (lambda p: change(p.tuned, QUERY, torch.full((32, 32), torch.nan)), f"{QUERY}: has a NaN"),
    "quantised weights": (
        lambda p: change(p.tuned, QUERY, torch.zeros(32, 32, dtype=torch.int8)), f"{QUERY}: holds I8",
    ),
    "a quantised config": (
        lambda p: set_config(p.tuned, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantization_config: says that the weights are quantised",
    ),
    "another architecture": (lambda p: set_config(p.base, model_type="roberta"), "is bert, the base's is roberta"),
    "fewer layers": (lambda p: set_config(p.tuned, num_hidden_layers=1), "layer.1.* is in the base alone"),
    "a class without a task": (
        lambda p: set_config(p.tuned, architectures=["BertForMaskedLM"]), "names BertForMaskedLM, .*; give the task",
    ),
    "a pickle": (
        lambda p: (p.tuned / "model.safetensors").rename(p.tuned / "pytorch_model.bin"),
        "is a pickle, .* save_pretrained",
    ),
    "no weights": (lambda p: (p.tuned / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "damaged weights": (
        lambda p: (p.tuned / "model.safetensors").write_bytes(b"\0" * 99), "cannot be read as safetensors",
    ),
    "no config": (lambda p: (p.tuned / "config.json").unlink(), "has no config.json"),
    "an adapter": (lambda p: (p.tuned / "adapter_config.json").write_text("{}"), "to lower its rank use compress"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_models_that_do_not_belong_together_are_refused_by_name(pair: Pair, tmp_path: Path, fault: str) -> None:
    spoil, says = FAULTS[fault]
    spoil(pair)
    with pytest.raises(CheckpointRejected, match=says):
        extract(pair, tmp_path / "out" / "adapter")
    assert not list((tmp_path / "out").iterdir())


def test_a_resized_vocabulary_is_refused_with_both_sizes(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama-tied")
    tuned = pair.load_tuned()
    tuned.resize_token_embeddings(30530, mean_resizing=False)
    tuned.save_pretrained(pair.tuned)
    with pytest.raises(
        CheckpointRejected, match=r"embed_tokens.weight: has 30530 rows, the base 30522: the vocabulary"
    ):
        extract(pair, tmp_path / "adapter")


def test_the_base_itself_and_unknown_targets_are_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "bert", only="nothing")
    with pytest.raises(InvalidRequest, match="differs from") as caught:
        extract(pair, tmp_path / "adapter")
    assert caught.value.field == "tuned"
    with pytest.raises(InvalidRequest, match="'q_proj' is the ending of no") as caught:
        extract(pair, tmp_path / "adapter", targets=("q_proj",))
    assert caught.value.field == "targets"


MEASURE = """
import resource, sys
sys.modules["peft"] = None  # importing it fails
from pathlib import Path
from lora_runtime.svd.extract import extract_adapter
from lora_runtime.svd.settings import ExtractSettings, RankRule
for depth in sys.argv[2:]:
    root = Path(sys.argv[1]) / depth
    extract_adapter(ExtractSettings(root / "base", root / "tuned", root / "out", RankRule(energy=1.0), threads=1))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Not even at full rank, where the adapter is larger than the model. Nor is PEFT needed."""
    for depth in (1, 12):
        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=depth, num_attention_heads=4, vocab_size=64,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / str(depth) / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / str(depth) / "tuned")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "1", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    small, large = (int(kib) / 1024 for kib in done.stdout.split())
    grown = 11 / 12 * (tmp_path / "12" / "base" / "model.safetensors").stat().st_size / 2**20
    assert grown > 25  # MiB, of each model; the adapter has twice as many
    assert large - small < 0.3 * grown
