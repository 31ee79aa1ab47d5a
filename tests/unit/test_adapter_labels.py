"""Labels, problem type and the base's name, from the files beside an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.plan import read_card
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import ProblemType
from tests.unit.base_specs import WIDTH, spec_of
from tests.unit.peft_folders import change_config, change_tensors, save


@pytest.fixture
def base() -> BaseSpec:
    return spec_of("bert")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("bert", "SEQ_CLS", tmp_path / "news", target_modules=["query"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "without a gap"),
        ({"id2label": {"-1": "a", "0": "b"}}, "without a gap"),
        ({"id2label": {"0": "a", "1": "a"}}, "twice"),
        ({"id2label": {"0": "a", "1": "x" * 5000}}, "256 characters"),
        ({"id2label": {"0": "a", "1": "\ud800"}}, "unicode"),
        ({"id2label": {"0": "a", "one": "b"}}, "integer"),
        ({"problem_type": ["single_label_classification"]}, "problem_type"),
    ],
)
def test_a_model_config_that_names_no_label_for_each_row_is_refused(
    folder: Path, base: BaseSpec, content: dict[str, Any], words: str
) -> None:
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterRejected, match=words) as caught:
        read_card(folder, base)
    assert caught.value.code == "CONFIG_INVALID"


def test_one_row_is_a_regression_unless_the_files_say_otherwise(folder: Path, base: BaseSpec) -> None:
    def one_row(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("weight", "bias"):
            tensors[f"base_model.model.classifier.{name}"] = tensors[f"base_model.model.classifier.{name}"][:1].clone()

    change_tensors(folder, one_row)
    assert read_card(folder, base).problem_type is ProblemType.REGRESSION
    (folder / "config.json").write_text('{"problem_type": "multi_label_classification"}')
    assert read_card(folder, base).problem_type is ProblemType.MULTI_LABEL


def test_the_name_of_the_base_is_not_a_path_of_the_machine_that_trained(folder: Path, base: BaseSpec) -> None:
    for written, name in (("/home/me/bert-base", "bert-base"), ("org/bert-base", "org/bert-base")):
        change_config(folder, base_model_name_or_path=written)
        assert read_card(folder, base).base_model_name == name


def test_labels_come_from_a_model_config_beside_the_adapter(folder: Path, base: BaseSpec) -> None:
    def eleven_rows(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.classifier.weight"] = torch.ones(11, WIDTH)
        tensors["base_model.model.classifier.bias"] = torch.ones(11)

    change_tensors(folder, eleven_rows)
    rows = {str(row): f"row {row}" for row in (10, *range(10))}
    (folder / "config.json").write_text(json.dumps({"id2label": rows, "problem_type": "multi_label_classification"}))
    card = read_card(folder, base)
    assert card.labels == tuple(f"row {row}" for row in range(11))
    assert card.problem_type is ProblemType.MULTI_LABEL
