"""How an adapter may lie on disk: in a named sub-folder, in shards, with copies of the base's own weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lora_runtime.adapters.checkpoint import Checkpoint, read_checkpoint
from lora_runtime.adapters.digests import file_sha256
from lora_runtime.adapters.plan import read_card
from lora_runtime.errors import AdapterRejected
from tests.unit.base_specs import VOCABULARY, WIDTH, spec_of
from tests.unit.peft_folders import CONFIG, NO_LIMIT, WEIGHTS, change_tensors, rename, save

INDEX = f"{WEIGHTS}.index.json"
SHARDS = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("llama", "CAUSAL_LM", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


def read(folder: Path, family: str = "llama") -> Checkpoint:
    return read_checkpoint(folder, spec_of(family), NO_LIMIT)


def refusal(folder: Path) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        read(folder)
    return caught.value


def shard(folder: Path) -> Path:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for i, name in enumerate(SHARDS):
        part = dict(sorted(tensors.items())[i::2])
        safetensors.torch.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    assert [w.site.name for w in first.sites] == [w.site.name for w in second.sites]
    for one, other in zip(first.sites, second.sites, strict=True):
        assert (one.a == other.a).all()
        assert (one.b == other.b).all()


def test_shards_are_one_adapter(folder: Path) -> None:
    whole = read(folder)
    assert_same(read(shard(folder)), whole)


def test_the_digest_of_shards_counts_each_of_them(folder: Path) -> None:
    first = read(shard(folder)).digest
    tensors = safetensors.torch.load_file(folder / SHARDS[1])
    safetensors.torch.save_file({key: value + 1 for key, value in tensors.items()}, folder / SHARDS[1])
    assert read(folder).digest != first


def _index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


BAD_SHARDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a shard is missing": (lambda f: (f / SHARDS[1]).unlink(), "WEIGHTS_MISSING", SHARDS[1]),
    "a shard more": (
        lambda f: shutil.copy(f / SHARDS[1], f / "adapter_model-00003-of-00002.safetensors"),
        "INDEX_INVALID",
        "00003",
    ),
    "a tensor elsewhere": (
        lambda f: _index(f, lambda m: m.update({max(m): SHARDS[0], min(m): SHARDS[1]})),
        "INDEX_INVALID",
        "is not where",
    ),
    "a tensor nowhere": (
        lambda f: _index(f, lambda m: m.update({"base_model.model.x.lora_A.weight": SHARDS[0]})),
        "MISSING_TENSOR",
        "names it",
    ),
    "a tensor not named": (lambda f: _index(f, lambda m: m.popitem()), "INDEX_INVALID", "is not where"),
    "a way out": (
        lambda f: _index(f, lambda m: m.update(dict.fromkeys(m, "../other.safetensors"))),
        "INDEX_INVALID",
        "not the name",
    ),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "INDEX_INVALID", "weight_map"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_shards_that_do_not_fit_their_index_are_refused(folder: Path, case: str) -> None:
    spoil, code, words = BAD_SHARDS[case]
    spoil(shard(folder))
    error = refusal(folder)
    assert (error.code, words in error.message) == (code, True), error.message


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    both = [safetensors.torch.load_file(folder / name) for name in SHARDS]
    key = next(iter(both[0]))
    safetensors.torch.save_file(both[1] | {key: both[0][key]}, folder / SHARDS[1])
    assert refusal(folder).code == "DUPLICATE_TENSOR"


def test_a_named_adapter_is_found_in_its_sub_folder(folder: Path, tmp_path: Path) -> None:
    whole = read(folder)
    named = tmp_path / "named"
    named.mkdir()
    shutil.copytree(folder, named / "news")
    (named / "logs").mkdir()
    (named / "multilora.json").write_text('{"task": "generate", "max_length": 7}')
    found = read(named)
    assert_same(found, whole)
    assert found.card.max_length == 7


def test_of_several_named_adapters_none_is_chosen(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / "named" / name)
    error = refusal(tmp_path / "named")
    assert error.code == "SEVERAL_ADAPTERS"
    assert "one, two" in error.message


def test_a_named_adapter_behind_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    os.symlink(folder, tmp_path / "named" / "news")
    assert refusal(tmp_path / "named").code == "LINK_OUT_OF_FOLDER"


def test_digests_cannot_name_files_outside_the_folder(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    digests = {"../secret": file_sha256(folder.parent / "secret")}
    (folder / "multilora.json").write_text(json.dumps({"task": "generate", "digests": digests}))
    assert refusal(folder).code == "DIGEST_MISMATCH"


def test_a_link_that_stays_inside_is_read(folder: Path) -> None:
    (folder / CONFIG).rename(folder / "config-of-it.json")
    os.symlink("config-of-it.json", folder / CONFIG)
    assert read(folder).sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_of_the_base_is_not_kept_whatever_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save("tied-llama", "CAUSAL_LM", tmp_path / "a", target_modules=["q_proj", "lm_head", "embed_tokens"])
    change_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items() if "base_layer" in k}))
    extras = read(folder, "tied-llama").extras
    assert not any(extra.params for extra in extras.values())


def test_another_output_layer_beside_lora_is_served_in_place_of_the_base(tmp_path: Path) -> None:
    folder = save("llama", "CAUSAL_LM", tmp_path / "a", target_modules=["q_proj", "lm_head"])
    other = torch.ones(VOCABULARY, WIDTH)
    change_tensors(folder, lambda t: t.update({k: other for k in t if k.endswith("lm_head.base_layer.weight")}))
    found = read(folder)
    assert (found.extras["lm_head"].params["weight"] == 1).all()
    assert "lm_head" in {w.site.name for w in found.sites}


def test_another_table_of_a_tied_base_is_its_output_layer_too(tmp_path: Path) -> None:
    folder = save("tied-llama", "CAUSAL_LM", tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    other = torch.ones(VOCABULARY, WIDTH)
    change_tensors(folder, lambda t: t.update({k: other for k in t if k.endswith("base_layer.weight")}))
    extras = read(folder, "tied-llama").extras
    assert (extras["embed_tokens"].params["weight"] == 1).all()
    assert (extras["lm_head"].params["weight"] == 1).all()


def test_a_copy_of_the_base_does_not_count_as_memory(tmp_path: Path) -> None:
    folder = save("llama", "CAUSAL_LM", tmp_path / "a", r=1, target_modules=["q_proj", "embed_tokens"])
    base = spec_of("llama")
    needed = 4 * read_checkpoint(folder, base, NO_LIMIT).num_parameters
    assert read_checkpoint(folder, base, needed).sites
    with pytest.raises(AdapterRejected, match="give it more"):
        read_checkpoint(folder, base, needed - 4)


def test_biases_as_early_peft_wrote_them_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save("bert", "SEQ_CLS", tmp_path / "a", target_modules=["query"], bias="lora_only")
    before = read(folder, "bert")
    change_tensors(
        folder, lambda t: t.update({k.replace("base_layer.", ""): t.pop(k) for k in list(t) if "base_l" in k})
    )
    after = read(folder, "bert")
    for path, extra in before.extras.items():
        assert extra.shift is not None and after.extras[path].shift is not None
        assert (extra.shift == after.extras[path].shift).all()
    read_card(folder, spec_of("bert"))
    assert "early PEFT" in caplog.text


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_any_task_class_of_the_base_may_have_trained_it(tmp_path: Path, prefix: str) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a", target_modules=["query"])
    rename(folder, "base_model.model.", f"base_model.model.{prefix}")
    assert len(read(folder, "bert").sites) == 2


def test_a_module_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a", target_modules=["query"])
    change_tensors(
        folder,
        lambda t: t.update({k.replace("model.encoder", "model.bert.encoder"): v.clone() for k, v in list(t.items())}),
    )
    with pytest.raises(AdapterRejected, match="two names") as caught:
        read(folder, "bert")
    assert caught.value.code == "DUPLICATE_TENSOR"
