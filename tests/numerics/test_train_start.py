"""Going on from an adapter that was trained before: its own parameters, or a refusal that says what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.run import train
from lora_runtime.train.settings import Init, LoraChoices, TrainSettings
from tests.training import make_bases, topics


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    folder = tmp_path_factory.mktemp("first")
    settings = topics(folder, make_bases(folder / "bases", ("bert",))["bert"])
    train(settings)
    return settings


def following(first: TrainSettings, out: Path, **values: Any) -> TrainSettings:
    return first.changed(out=out, start_from=first.run.out, epochs=1, **values)


def test_it_begins_with_the_parameters_of_the_first(first: TrainSettings, tmp_path: Path) -> None:
    """At a learning rate of nearly nothing they are those at the end too; another seed draws another order and head."""
    settings = following(first, tmp_path / "next", learning_rate=1e-12, seed=5)
    train(settings)
    before, after = (load_file(out / "adapter_model.safetensors") for out in (first.run.out, settings.run.out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-9), name


def test_it_learns_on(first: TrainSettings, tmp_path: Path) -> None:
    begun = train(first.changed(out=tmp_path / "begun", epochs=1))
    gone_on = train(following(first, tmp_path / "next", learning_rate=1e-3))
    assert gone_on.step_losses[0] < begun.step_losses[0] - 0.2
    assert gone_on.best.valid_loss < begun.best.valid_loss - 0.2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rank": 8, "alpha": 8.0}, "has r 4, this run 8"),
        ({"alpha": 4.0}, "has lora_alpha 8, this run 4"),
        ({"rslora": True}, "use_rslora False, this run True"),
        ({"target_modules": ("query",)}, "has target_modules attention.output.dense, .*, this run query"),
    ],
    ids=str,
)
def test_another_form_is_refused(first: TrainSettings, tmp_path: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        train(following(first, tmp_path / "next", **values))
    assert caught.value.field == "start_from"
    assert not (tmp_path / "next").exists()


def test_other_labels_are_refused(first: TrainSettings, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "cat dog,pets\nred blue,colours\n" * 20)
    with pytest.raises(InvalidRequest, match="labels animals, colours, metals; the rows have colours, pets"):
        train(following(first, tmp_path / "next", train=rows, valid=None))


def test_another_base_is_refused(first: TrainSettings, tmp_path: Path) -> None:
    other = make_bases(tmp_path / "bases", ("distilbert",))["distilbert"]
    with pytest.raises(InvalidRequest, match="trained on another base"):
        train(following(first, tmp_path / "next", base=other))


def test_what_is_no_adapter_is_refused(first: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=r"cannot be read .*adapter_config\.json"):
        train(first.changed(out=tmp_path / "next", start_from=tmp_path / "empty"))


def test_tensors_of_another_shape_are_refused(first: TrainSettings, tmp_path: Path) -> None:
    """A configuration that lies about its own weights."""
    lying = tmp_path / "lying"
    lying.mkdir()
    for path in first.run.out.iterdir():
        (lying / path.name).write_bytes(path.read_bytes())
    config = json.loads((lying / "adapter_config.json").read_text())
    (lying / "adapter_config.json").write_text(json.dumps(config | {"r": 8, "lora_alpha": 8.0}))
    with pytest.raises(InvalidRequest, match=r"of shape \(4, .*, this run \(8, "):
        train(first.changed(out=tmp_path / "next", start_from=lying, rank=8, alpha=8.0))


def test_it_is_either_this_or_an_initialisation(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="leave one of them out"):
        LoraChoices(start_from=tmp_path, init=Init.PISSA)
