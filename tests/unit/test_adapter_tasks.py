"""What an adapter answers is found from its files: metadata, else the head it holds, else its task type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.metadata import AdapterMetadata
from lora_runtime.adapters.plan import read_card
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import Pooling, Task
from tests.unit.base_specs import spec_of
from tests.unit.peft_folders import NO_LIMIT, change_config, save

HEADS = {
    ("bert", "SEQ_CLS"): Task.CLASSIFY,
    ("bert", "TOKEN_CLS"): Task.CLASSIFY_TOKENS,
    ("bert", "QUESTION_ANS"): Task.ANSWER,
    ("bert", "FEATURE_EXTRACTION"): Task.EMBED,
    ("llama", "SEQ_CLS"): Task.CLASSIFY,
    ("llama", "CAUSAL_LM"): Task.GENERATE,
    ("llama", "FEATURE_EXTRACTION"): Task.EMBED,
}


@pytest.mark.parametrize(("family", "task_type"), HEADS)
def test_the_task_type_is_the_task(tmp_path: Path, family: str, task_type: str) -> None:
    card = read_card(save(family, task_type, tmp_path / "a"), spec_of(family))
    assert card.task is HEADS[family, task_type]
    assert (card.labels is not None) == (card.task in (Task.CLASSIFY, Task.CLASSIFY_TOKENS))


@pytest.mark.parametrize("given", [None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "SEQ_2_SEQ_LM", "OTHER"])
def test_the_head_that_is_there_decides_over_a_wrong_task_type(tmp_path: Path, given: str | None) -> None:
    folder = save("bert", "QUESTION_ANS", tmp_path / "a")
    change_config(folder, task_type=given)
    assert read_card(folder, spec_of("bert")).task is Task.ANSWER


@pytest.mark.parametrize(("family", "task"), [("bert", Task.EMBED), ("llama", Task.GENERATE)])
def test_without_head_and_task_type_the_base_decides(tmp_path: Path, family: str, task: Task) -> None:
    folder = save(family, "FEATURE_EXTRACTION", tmp_path / "a")
    change_config(folder, task_type=None)
    assert read_card(folder, spec_of(family)).task is task


def test_a_task_the_base_is_not_served_to_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    change_config(folder, task_type="CAUSAL_LM")
    with pytest.raises(AdapterRejected, match="the base is an encoder") as caught:
        read_card(folder, spec_of("bert", unserved={Task.GENERATE: "the base is an encoder"}))
    assert caught.value.code == "TASK_UNSUPPORTED"


def test_an_unknown_task_type_is_refused(tmp_path: Path) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    change_config(folder, task_type="PARSING")
    with pytest.raises(AdapterRejected, match="PARSING"):
        read_card(folder, spec_of("bert"))


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, Pooling.MEAN),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, Pooling.CLS),
        ({"pooling_mode_lasttoken": True}, Pooling.LAST),
        ({"pooling_mode": "cls"}, Pooling.CLS),
    ],
)
def test_pooling_is_that_of_sentence_transformers(tmp_path: Path, content: Any, pooling: Pooling) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    write(folder, "1_Pooling/config.json", content)
    assert read_card(folder, spec_of("bert")).pooling is pooling


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}),
        ("1_Pooling/config.json", {"word_embedding_dimension": 12}),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}]),
        ("modules.json", {"type": "sentence_transformers.models.Transformer"}),
    ],
)
def test_other_poolings_and_layers_after_it_are_refused(tmp_path: Path, name: str, content: Any) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    write(folder, name, content)
    with pytest.raises(AdapterRejected) as caught:
        read_card(folder, spec_of("bert"))
    assert caught.value.where == name


def test_vectors_are_normalised_where_a_module_says_so(tmp_path: Path) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    assert not read_card(folder, spec_of("bert")).normalize
    names = ("Transformer", "Pooling", "Normalize")
    write(folder, "modules.json", [{"type": f"sentence_transformers.models.{name}"} for name in names])
    assert read_card(folder, spec_of("bert")).normalize


def test_without_such_files_an_encoder_means_and_a_decoder_takes_the_last(tmp_path: Path) -> None:
    for family, pooling in (("bert", Pooling.MEAN), ("llama", Pooling.LAST)):
        folder = save(family, "FEATURE_EXTRACTION", tmp_path / family)
        assert read_card(folder, spec_of(family)).pooling is pooling


def test_metadata_decides_over_all_other_files(tmp_path: Path) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    write(folder, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    write(folder, "config.json", {"pad_token_id": 5})
    AdapterMetadata(task=Task.EMBED, pooling=Pooling.CLS, normalize=True, pad_token_id=3).write(folder)
    card = read_card(folder, spec_of("bert"))
    assert (card.pooling, card.normalize, card.pad_token_id) == (Pooling.CLS, True, 3)


@pytest.mark.parametrize(("config", "pad"), [({"pad_token_id": 5}, 5), ({"pad_token_id": [5]}, 0), ({}, 0), (None, 0)])
def test_the_padding_token_is_that_of_the_config_else_the_bases(tmp_path: Path, config: Any, pad: int) -> None:
    folder = save("llama", "SEQ_CLS", tmp_path / "a")
    if config is not None:
        write(folder, "config.json", config)
    assert read_card(folder, spec_of("llama")).pad_token_id == pad


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"task": "classify"}, "need labels"),
        ({"task": "embed", "labels": ["a"]}, "have no labels"),
        ({"task": "answer", "pooling": "mean"}, "neither pooling"),
        ({"task": "classify", "labels": ["a"], "normalize": True}, "neither pooling"),
    ],
)
def test_metadata_has_the_fields_of_its_task_alone(tmp_path: Path, content: Any, words: str) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    write(folder, "multilora.json", content)
    with pytest.raises(AdapterRejected, match=words) as caught:
        read_card(folder, spec_of("bert"))
    assert caught.value.code == "METADATA_INVALID"


def test_invocation_tokens_are_on_the_card(tmp_path: Path) -> None:
    folder = save("llama", "CAUSAL_LM", tmp_path / "a", alora_invocation_tokens=[4, 7])
    assert read_card(folder, spec_of("llama")).invocation_tokens == (4, 7)


def test_files_that_decided_are_part_of_the_identity(tmp_path: Path) -> None:
    folder = save("bert", "FEATURE_EXTRACTION", tmp_path / "a")
    base = spec_of("bert")
    first = read_checkpoint(folder, base, NO_LIMIT).digest
    write(folder, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    assert read_checkpoint(folder, base, NO_LIMIT).digest != first
