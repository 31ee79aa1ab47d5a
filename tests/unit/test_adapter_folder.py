"""An adapter folder is either understood wholly or refused with a reason that says what and where."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.checkpoint import Checkpoint, read_checkpoint
from lora_runtime.adapters.digests import file_sha256
from lora_runtime.adapters.folder import AdapterFolder
from lora_runtime.adapters.image import head_views, plan_image, write_image
from lora_runtime.adapters.metadata import AdapterMetadata
from lora_runtime.adapters.plan import read_card
from lora_runtime.errors import AdapterRejected
from lora_runtime.model.load import load_base
from lora_runtime.types import Task
from tests.oracle import ALL_LINEAR, make_adapter
from tests.unit.peft_folders import CONFIG, WEIGHTS, change_config, change_tensors

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> BaseSpec:
    return load_base(tiny_bert).spec


@pytest.fixture(scope="module")
def pristine(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_bert, tmp_path_factory.mktemp("pristine") / "news", rank=4, targets=ALL_LINEAR)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "news"))


def read(folder: Path, base: BaseSpec) -> Checkpoint:
    return read_checkpoint(folder, base, max_bytes=1 << 30)


def drop_head(folder: Path) -> None:
    change_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "classifier" in key])


def refusal(folder: Path, base: BaseSpec) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        read(folder, base)
    assert str(folder.parent) not in caught.value.message, "a reason must not show the server's paths"
    return caught.value


def test_a_good_folder_is_read_whole(folder: Path, base: BaseSpec) -> None:
    checkpoint = read(folder, base)
    assert {w.site.name for w in checkpoint.sites} == {s.name for s in base.sites if not s.per_sequence}
    assert set(checkpoint.params) == {"classifier.weight", "classifier.bias"}
    assert checkpoint.card.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert all(w.scaling == 2.0 for w in checkpoint.sites)


def test_the_digest_changes_with_any_file_that_counts_and_with_nothing_else(folder: Path, base: BaseSpec) -> None:
    first = read(folder, base).digest
    (folder / "notes.txt").write_text("unrelated")
    assert read(folder, base).digest == first
    change_config(folder, lora_dropout=0.5)
    assert read(folder, base).digest != first


def test_the_image_holds_every_tensor_in_its_place(folder: Path, base: BaseSpec) -> None:
    checkpoint = read(folder, base)
    layout = plan_image(checkpoint, base.groups)
    run = torch.full((layout.num_elements,), float("nan"))
    write_image(checkpoint, layout, run)
    for place, weights in zip(layout.sites, checkpoint.sites, strict=True):
        group_rank = sum(other.rank for other in checkpoint.sites if other.site.group == weights.site.group)
        a = run.as_strided((weights.site.d_in, weights.rank), (group_rank, 1), place.a_offset)
        b = run[place.b_offset : place.b_offset + weights.b.size].view(weights.b.T.shape)
        assert torch.equal(a, torch.from_numpy(weights.a).T)
        assert torch.equal(b, torch.from_numpy(weights.b).T)
    for name, view in head_views(layout, run).items():
        assert torch.equal(view, torch.from_numpy(checkpoint.params[name]))


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "pickle only": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "PICKLE", "can run code"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "WEIGHTS_MISSING", WEIGHTS),
    "no config": (lambda f: (f / CONFIG).unlink(), "CONFIG_MISSING", CONFIG),
    "config not JSON": (lambda f: (f / CONFIG).write_text("{r: 8"), "JSON_INVALID", CONFIG),
    "config a list": (lambda f: (f / CONFIG).write_text("[1]"), "JSON_INVALID", "not an object"),
    "config in Latin-1": (lambda f: (f / CONFIG).write_bytes(b'{"r": "\xe9"}'), "JSON_INVALID", CONFIG),
    "another method": (lambda f: change_config(f, peft_type="IA3"), "NOT_LORA", "IA3"),
    "rank zero": (lambda f: change_config(f, r=0), "CONFIG_INVALID", "field r"),
    "alpha a word": (lambda f: change_config(f, lora_alpha="big"), "CONFIG_INVALID", "lora_alpha"),
    "DoRA without its magnitude": (lambda f: change_config(f, use_dora=True), "MISSING_TENSOR", "use_dora"),
    "biases of LoRA that are not there": (lambda f: change_config(f, lora_bias=True), "MISSING_TENSOR", "lora_bias"),
    "an unknown kind of bias": (lambda f: change_config(f, bias="some"), "CONFIG_INVALID", "bias"),
    "a task that the base has no head for": (
        lambda f: (drop_head(f), change_config(f, task_type="CAUSAL_LM")),
        "TASK_UNSUPPORTED",
        "generate",
    ),
    "a task of two stacks": (
        lambda f: (drop_head(f), change_config(f, task_type="SEQ_2_SEQ_LM")),
        "TASK_UNSUPPORTED",
        "SEQ_2_SEQ_LM",
    ),
    "a broken pattern": (lambda f: change_config(f, rank_pattern={"(": 4}), "CONFIG_INVALID", "regular expression"),
    "a pattern too long": (
        lambda f: change_config(f, rank_pattern={"a" * 1001: 4}),
        "CONFIG_INVALID",
        "the limit is 1000",
    ),
    "a rank of a pattern zero": (lambda f: change_config(f, rank_pattern={"x": 0}), "CONFIG_INVALID", "rank_pattern"),
    "an alpha of a pattern NaN": (
        lambda f: change_config(f, alpha_pattern={"query": float("nan")}),
        "CONFIG_INVALID",
        "alpha_pattern",
    ),
    "an alpha that overflows": (lambda f: change_config(f, lora_alpha=1e300), "CONFIG_INVALID", "float32"),
    "an alpha beyond a float": (lambda f: change_config(f, lora_alpha=10**400), "CONFIG_INVALID", "lora_alpha"),
    "a target without tensors": (
        lambda f: change_tensors(f, lambda t: [t.pop(f"{QUERY}.lora_{w}.weight") for w in "AB"]),
        "MISSING_TENSOR",
        "target_modules",
    ),
    "a head under two names": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.bert.classifier.bias": torch.ones(3)})),
        "DUPLICATE_TENSOR",
        "second name",
    ),
    "a length beyond the protocol": (
        lambda f: (f / "multilora.json").write_text('{"task": "classify", "labels": ["a"], "max_length": 4294967296}'),
        "METADATA_INVALID",
        "max_length",
    ),
    "rank of the config wrong": (lambda f: change_config(f, r=5), "SHAPE_MISMATCH", "lora_A"),
    "a NaN": (
        lambda f: change_tensors(f, lambda t: t[f"{QUERY}.lora_A.weight"].view(-1)[3].fill_(float("nan"))),
        "NOT_FINITE",
        f"{QUERY}.lora_A.weight",
    ),
    "an infinity": (
        lambda f: change_tensors(f, lambda t: t[f"{QUERY}.lora_B.weight"].view(-1)[0].fill_(float("inf"))),
        "NOT_FINITE",
        f"{QUERY}.lora_B.weight",
    ),
    "half of a pair": (
        lambda f: change_tensors(f, lambda t: t.pop(f"{QUERY}.lora_B.weight")),
        "MISSING_TENSOR",
        f"{QUERY}.lora_B.weight",
    ),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(4, 35)})),
        "SHAPE_MISMATCH",
        "[4, 36] is needed",
    ),
    "one dimension": (
        lambda f: change_tensors(f, lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(4)})),
        "SHAPE_MISMATCH",
        "[4]",
    ),
    "integers": (
        lambda f: change_tensors(
            f, lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(4, 36, dtype=torch.int8)})
        ),
        "DTYPE_UNSUPPORTED",
        "I8",
    ),
    "no head": (
        lambda f: change_tensors(f, lambda t: t.pop("base_model.model.classifier.weight")),
        "HEAD_MISSING",
        "classifier.weight",
    ),
    "half a head": (
        lambda f: change_tensors(f, lambda t: t.pop("base_model.model.classifier.bias")),
        "HEAD_MISSING",
        "classifier.bias",
    ),
    "head of other width": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.classifier.weight": torch.ones(3, 9)})),
        "SHAPE_MISMATCH",
        "classifier.weight",
    ),
    "head that disagrees": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.classifier.bias": torch.ones(4)})),
        "SHAPE_MISMATCH",
        "disagree",
    ),
    "only a head": (
        lambda f: change_tensors(f, lambda t: [t.pop(k) for k in list(t) if "lora" in k]),
        "NO_LORA",
        "adapts nothing",
    ),
    "a module of another base": (
        lambda f: change_tensors(f, lambda t: t.update({f"{QUERY}2.lora_A.weight": torch.ones(4, 36)})),
        "FOREIGN_BASE",
        "no such module",
    ),
    "an embedding": (
        lambda f: change_tensors(
            f, lambda t: t.update({"base_model.model.bert.embeddings.word_embeddings.lora_A.weight": torch.ones(4, 36)})
        ),
        "SITE_UNSUPPORTED",
        "word_embeddings",
    ),
    "a norm of another width": (
        lambda f: change_tensors(
            f, lambda t: t.update({"base_model.model.bert.embeddings.LayerNorm.weight": torch.ones(35)})
        ),
        "SHAPE_MISMATCH",
        "LayerNorm",
    ),
    "a parameter of no module that can be replaced": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.bert.encoder.weight": torch.ones(35)})),
        "FEATURE_UNSUPPORTED",
        "encoder.weight",
    ),
    "a weight beside LoRA": (
        lambda f: change_tensors(f, lambda t: t.update({f"{QUERY}.weight": torch.ones(36, 36)})),
        "UNEXPECTED_TENSOR",
        "beside LoRA",
    ),
    "a key of nobody": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.extra": torch.ones(1)})),
        "UNEXPECTED_TENSOR",
        "extra",
    ),
    "a foreign prefix": (
        lambda f: change_tensors(f, lambda t: t.update({"model.extra": torch.ones(1)})),
        "UNEXPECTED_TENSOR",
        "PEFT",
    ),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "WEIGHTS_CORRUPT", "cut short"),
    "weights cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]),
        "WEIGHTS_CORRUPT",
        WEIGHTS,
    ),
    "a header that lies": (
        lambda f: (f / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
        "WEIGHTS_CORRUPT",
        "header",
    ),
    "text for weights": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs"), "WEIGHTS_CORRUPT", "header"),
    "metadata not valid": (
        lambda f: (f / "multilora.json").write_text('{"task": "classify", "labels": []}'),
        "METADATA_INVALID",
        "labels",
    ),
    "metadata unknown": (
        lambda f: (f / "multilora.json").write_text('{"task": "classify", "labels": ["a"], "surprise": 1}'),
        "METADATA_INVALID",
        "surprise",
    ),
    "labels repeat": (
        lambda f: (f / "multilora.json").write_text('{"task": "classify", "labels": ["a", "a", "b"]}'),
        "METADATA_INVALID",
        "repeat",
    ),
    "labels too few": (
        lambda f: (f / "multilora.json").write_text('{"task": "classify", "labels": ["a", "b"]}'),
        "LABELS_MISMATCH",
        "3 rows, but 2 labels",
    ),
    "digest of other weights": (
        lambda f: (f / "multilora.json").write_text(
            json.dumps({"task": "classify", "labels": ["a", "b", "c"], "digests": {WEIGHTS: "0" * 64}})
        ),
        "DIGEST_MISMATCH",
        WEIGHTS,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_folder_is_refused_with_its_reason(folder: Path, base: BaseSpec, case: str) -> None:
    spoil, code, words = REFUSED[case]
    spoil(folder)
    error = refusal(folder, base)
    assert error.code == code
    assert words in error.message


def test_a_link_out_of_the_folder_is_refused(folder: Path, base: BaseSpec, tmp_path: Path) -> None:
    shutil.move(folder / WEIGHTS, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / WEIGHTS)
    assert refusal(folder, base).code == "LINK_OUT_OF_FOLDER"


def test_weights_replaced_between_the_plan_and_their_reading_are_refused(
    folder: Path, base: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size: their places would be those of other tensors."""
    data = (folder / WEIGHTS).read_bytes()
    keys = [f"{QUERY}.lora_A.weight".encode(), QUERY.replace(".0.", ".1.").encode() + b".lora_A.weight"]
    other = data.replace(keys[0], b"<first>").replace(keys[1], keys[0]).replace(b"<first>", keys[1])
    assert len(other) == len(data) and other != data
    read_weights = AdapterFolder.read_weights

    def late(opened: AdapterFolder, name: str) -> bytearray:
        (folder / WEIGHTS).write_bytes(other)
        return read_weights(opened, name)

    monkeypatch.setattr(AdapterFolder, "read_weights", late)
    error = refusal(folder, base)
    assert error.code == "WEIGHTS_CORRUPT" and "changed while it was read" in error.message


def test_a_tensor_named_twice_is_refused(folder: Path, base: BaseSpec) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    key, entry = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    doubled = (header[:-1] + f',"{key}":{json.dumps(entry)}' + "}").encode()
    (folder / WEIGHTS).write_bytes(len(doubled).to_bytes(8, "little") + doubled + data[8 + length :])
    error = refusal(folder, base)
    assert (error.code, key in error.where) == ("DUPLICATE_TENSOR", True)


def test_a_file_larger_than_the_arena_is_refused_before_it_is_read(folder: Path, base: BaseSpec) -> None:
    with pytest.raises(AdapterRejected, match="give it more") as caught:
        read_checkpoint(folder, base, max_bytes=1000)
    assert caught.value.code == "TOO_LARGE"


def test_a_foreign_base_is_told_by_its_weights(folder: Path, base: BaseSpec) -> None:
    other = base.fingerprint.model_copy(update={"weights_sha256": "f" * 64})
    metadata = AdapterMetadata(task=Task.CLASSIFY, labels=("a", "b", "c"), base=base.fingerprint)
    metadata.write(folder)
    assert read(folder, base).card.labels == ("a", "b", "c")
    metadata.model_copy(update={"base": other}).write(folder)
    error = refusal(folder, base)
    assert error.code == "FOREIGN_BASE"
    assert "weights_sha256 differs" in error.message


def test_digests_of_the_metadata_are_verified(folder: Path, base: BaseSpec) -> None:
    digests = {name: file_sha256(folder / name) for name in (WEIGHTS, CONFIG)}
    AdapterMetadata(task=Task.CLASSIFY, labels=("a", "b", "c"), digests=digests).write(folder)
    assert read(folder, base).card.labels == ("a", "b", "c")


def test_a_pattern_that_would_take_for_ever_is_refused_in_seconds(
    folder: Path, base: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_runtime.adapters.patterns.MATCHING_SECONDS", 0.2)
    change_config(folder, rank_pattern={r"(.|\w)" * 24 + r"\d\d\d": 4})
    started = time.monotonic()
    assert "takes more than" in refusal(folder, base).message
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["multilora.json", "config.json", CONFIG])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(folder: Path, base: BaseSpec, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert refusal(folder, base).code == "NOT_A_FILE"


def test_a_loop_of_links_is_refused(folder: Path, base: BaseSpec) -> None:
    os.symlink("multilora.json", folder / "multilora.json")
    assert refusal(folder, base).code == "LINK_OUT_OF_FOLDER"


def test_a_reason_is_printable_and_short_whatever_the_files_hold(folder: Path, base: BaseSpec) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = '{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    header = ('{"\\ud800\\n' + "x" * 10_000 + f'":{entry},' + data[9 : 8 + length].decode()).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    message = refusal(folder, base).message
    assert message.isprintable()
    assert len(message) <= 2000


def test_unknown_config_fields_are_ignored_with_a_warning(
    folder: Path, base: BaseSpec, caplog: pytest.LogCaptureFixture
) -> None:
    change_config(folder, from_the_future=1)
    assert read_card(folder, base).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert "from_the_future" in caplog.text
    assert read(folder, base).sites


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_read(folder: Path, base: BaseSpec, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    checkpoint = read(folder, base)
    layout = plan_image(checkpoint, base.groups)
    run = torch.zeros(layout.num_elements)
    write_image(checkpoint, layout, run)
    place = layout.sites[0]
    first = checkpoint.sites[0]
    assert torch.equal(run[place.b_offset : place.b_offset + first.b.size], torch.from_numpy(first.b.T).reshape(-1))


def test_bfloat16_values_are_kept_exactly(folder: Path, base: BaseSpec) -> None:
    change_tensors(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    saved = safetensors.torch.load_file(folder / WEIGHTS)
    found = read(folder, base).sites[0]
    assert torch.equal(torch.from_numpy(found.a), saved[f"{QUERY}.lora_A.weight"].float())


def test_a_float64_beyond_float32_is_refused(folder: Path, base: BaseSpec) -> None:
    change_tensors(
        folder, lambda t: t.update({f"{QUERY}.lora_A.weight": torch.full((4, 36), 1e300, dtype=torch.float64)})
    )
    assert refusal(folder, base).code == "NOT_FINITE"
