"""Training for real, on tiny random bases: what is written, and that PEFT alone reproduces what is reported."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from lora_runtime.adapters.digests import file_digests
from lora_runtime.adapters.fingerprint import fingerprint_base
from lora_runtime.adapters.metadata import read_metadata
from lora_runtime.errors import BaseModelUnsupported, InvalidRequest, TrainingDataInvalid
from lora_runtime.train.progress import EvalReport, SilentObserver, TrainReport
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.train.run import train
from lora_runtime.train.settings import Schedule, TrainSettings
from lora_runtime.types import ProblemType, Task
from server.cli_train import train_app
from tests.training import FILES, TOPICS, make_bases, peft_scores, topics

FAMILIES = ("bert", "distilbert", "electra", "gpt2", "bert_without_pooler")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_bases(tmp_path_factory.mktemp("bases"), FAMILIES)


@pytest.fixture
def settings(tmp_path: Path, bases: dict[str, str]) -> TrainSettings:
    return topics(tmp_path, bases["bert"])


@pytest.mark.parametrize("base", FAMILIES)
def test_peft_alone_reproduces_the_reported_accuracy(settings: TrainSettings, bases: dict[str, str], base: str) -> None:
    settings = settings.changed(base=bases[base])
    report = train(settings)
    assert report.best.metrics["accuracy"] > report.plan.baseline["accuracy"] + 0.3
    assert report.best.metrics["accuracy"] == max(epoch.metrics["accuracy"] for epoch in report.passes)
    accuracy, loss = peft_scores(settings, report.plan.labels)
    assert accuracy == pytest.approx(report.best.metrics["accuracy"])
    assert loss == pytest.approx(report.best.valid_loss, rel=1e-4)


def test_the_weights_are_those_of_the_best_epoch_not_of_the_last(settings: TrainSettings) -> None:
    settings = settings.changed(learning_rate=0.3, schedule=Schedule.CONSTANT, epochs=8)
    report = train(settings)
    last = report.passes[-1]
    assert report.best.epoch < last.epoch
    assert report.best.valid_loss != pytest.approx(last.valid_loss, rel=0.01)
    assert peft_scores(settings, report.plan.labels)[1] == pytest.approx(report.best.valid_loss, rel=1e-4)


def test_an_adapter_carries_a_pooler_that_its_base_lacks(settings: TrainSettings, bases: dict[str, str]) -> None:
    train(settings.changed(base=bases["bert_without_pooler"], epochs=1))
    names = set(load_file(settings.run.out / "adapter_model.safetensors"))
    assert {name for name in names if "lora_" not in name} == {
        "base_model.model.bert.pooler.dense.weight",
        "base_model.model.bert.pooler.dense.bias",
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


def test_the_folder_says_what_serving_needs_and_nothing_else_is_left(settings: TrainSettings) -> None:
    report = train(settings)
    assert {path.name for path in settings.run.out.iterdir()} == FILES
    assert [path.name for path in settings.run.out.parent.iterdir()] == ["topics"]
    config = json.loads((settings.run.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "SEQ_CLS")
    assert config["base_model_name_or_path"] == "bert"
    assert str(Path(settings.base).parent) not in "".join(path.read_text() for path in settings.run.out.glob("*.json"))
    metadata = read_metadata(settings.run.out)
    assert metadata is not None
    assert (metadata.task, metadata.problem_type) == (Task.CLASSIFY, ProblemType.SINGLE_LABEL)
    assert metadata.labels == ("animals", "colours", "metals")
    assert (metadata.max_length, metadata.pad_token_id, metadata.base_model_name) == (16, 0, "bert")
    backbone = AutoModel.from_pretrained(settings.base)
    assert metadata.base == fingerprint_base(backbone, backbone.config)
    assert metadata.digests == file_digests(settings.run.out, FILES - {"multilora.json"})
    assert metadata.metrics["accuracy"] == report.best.metrics["accuracy"]


def test_the_fingerprint_is_of_the_checkpoint_in_its_own_dtype(settings: TrainSettings, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModel.from_pretrained(settings.base).to(torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(settings.base).save_pretrained(half)
    train(settings.changed(base=str(half), epochs=1))
    metadata = read_metadata(settings.run.out)
    backbone = AutoModel.from_pretrained(half, dtype="auto")
    assert backbone.dtype is torch.bfloat16
    assert metadata is not None
    assert metadata.base == fingerprint_base(backbone, backbone.config)
    tensors = load_file(settings.run.out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(settings: TrainSettings) -> None:
    def trained(name: str, seed: int) -> list[bytes]:
        out = settings.run.out.with_name(name)
        train(settings.changed(out=out, seed=seed, valid=None, dropout=0.1, epochs=2))
        return [(out / file).read_bytes() for file in sorted(FILES)]

    first = trained("first", 7)
    torch.rand(5), random.random()  # what the caller drew before must not matter
    assert trained("second", 7) == first
    assert trained("third", 8)[1] != first[1]


def test_training_prints_nothing_and_leaves_the_process_as_it_was(
    settings: TrainSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    state, threads, level = (
        random.getstate(),
        torch.get_num_threads(),
        logging.getLogger("transformers").level,
    )
    train(settings.changed(epochs=1))
    assert torch.equal(torch.rand(4), expected)
    assert random.getstate() == state
    assert torch.get_num_threads() == threads
    assert logging.getLogger("transformers").level == level
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_not_empty_is_refused_before_training(settings: TrainSettings) -> None:
    settings.run.out.mkdir(parents=True)
    (settings.run.out / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="is not empty") as caught:
        train(settings)
    assert caught.value.field == "out"
    with pytest.raises(InvalidRequest, match="something else than an adapter"):
        train(settings.changed(overwrite=True))
    assert [path.name for path in settings.run.out.iterdir()] == ["notes.txt"]


def test_overwriting_replaces_the_whole_adapter(settings: TrainSettings) -> None:
    settings = settings.changed(epochs=1)
    train(settings)
    (settings.run.out / "README.md").write_text("old")
    train(settings.changed(overwrite=True, rank=2))
    assert {path.name for path in settings.run.out.iterdir()} == FILES
    assert json.loads((settings.run.out / "adapter_config.json").read_text())["r"] == 2
    assert [path.name for path in settings.run.out.parent.iterdir()] == ["topics"]


class PowerCut(SilentObserver):
    """Fails in the second step."""

    def on_step(self, step: int, loss: float) -> None:
        del loss
        if step == 2:
            raise RuntimeError("power cut")


def test_a_run_that_fails_leaves_nothing_behind(settings: TrainSettings) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, PowerCut())
    assert list(settings.run.out.parent.iterdir()) == []


def test_a_run_that_fails_leaves_the_old_adapter_as_it_was(settings: TrainSettings) -> None:
    train(settings.changed(epochs=1))
    before = {path.name: path.read_bytes() for path in settings.run.out.iterdir()}
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings.changed(overwrite=True), PowerCut())
    assert {path.name: path.read_bytes() for path in settings.run.out.iterdir()} == before
    assert [path.name for path in settings.run.out.parent.iterdir()] == ["topics"]


def test_progress_is_told_step_by_step(settings: TrainSettings) -> None:
    seen: list[object] = []

    class Recorder(SilentObserver):
        def on_step(self, step: int, loss: float) -> None:
            del loss
            seen.append(step)

        def on_eval(self, report: EvalReport) -> None:
            seen.append(report)

    report: TrainReport = train(settings.changed(epochs=2, batch_size=30), Recorder())
    assert seen == [1, 2, 3, report.passes[0], 4, 5, 6, report.passes[1]]
    assert report.plan.num_steps == 6


def test_multi_label_learns_each_label(settings: TrainSettings, tmp_path: Path) -> None:
    path = tmp_path / "multi.jsonl"
    draw = random.Random(0)
    rows: list[dict[str, object]] = []
    for _ in range(120):
        names = [name for name in sorted(TOPICS) if draw.random() < 0.5]
        words = " ".join(draw.choice(TOPICS[name].split()) for name in names)
        rows.append({"text": f"we saw {words}", "label": names})
    path.write_text("\n".join(map(json.dumps, rows)))
    schema = ClassifySchema(problem_type=ProblemType.MULTI_LABEL)
    report = train(settings.changed(train=path, valid=None, valid_share=0.3, schema=schema, epochs=12))
    assert report.best.metrics["accuracy"] > report.plan.baseline["accuracy"] + 0.2
    metadata = read_metadata(settings.run.out)
    assert metadata is not None
    assert metadata.problem_type is ProblemType.MULTI_LABEL


def test_regression_learns_a_value_and_keeps_the_epoch_of_the_least_error(
    settings: TrainSettings, tmp_path: Path
) -> None:
    path = tmp_path / "values.csv"
    draw = random.Random(0)
    pairs = [(draw.choice(["red", "blue"]), draw.choice(["cat", "dog"])) for _ in range(80)]
    lines = [f"{a} {b},{(a == 'red') - 0.5 * (b == 'dog')}" for a, b in pairs]
    path.write_text("\n".join(["text,score", *lines]))
    schema = ClassifySchema(label="score", problem_type=ProblemType.REGRESSION)
    report = train(settings.changed(train=path, valid=None, valid_share=0.3, schema=schema, epochs=8))
    assert report.best.metrics["mse"] < 0.5 * report.plan.baseline["mse"]
    assert report.best.metrics["mse"] == min(epoch.metrics["mse"] for epoch in report.passes)
    assert report.plan.labels == ("score",)


def test_text_pairs_are_trained_on_and_long_ones_are_counted(settings: TrainSettings, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    lines = [f"cat,{'dog ' * (20 if row < 5 else 1)},{'same' if row % 2 else 'other'}" for row in range(20)]
    path.write_text("\n".join(["text,text_pair,label", *lines]))
    report = train(settings.changed(train=path, valid=None, epochs=1))
    assert report.plan.num_truncated_rows == 5


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"target_modules": ("q_proj",)}, "target_modules", "'q_proj' matches no module of Bert"),
        ({"target_modules": ("LayerNorm",)}, "target_modules", "which is not a linear layer"),
        ({"target_modules": ("classifier",)}, "target_modules", "which is trained in full"),
        ({"max_length": 4096}, "max_length", "is 4096 tokens, the base allows 512"),
        ({"learning_rate": 1e30}, "learning_rate", "training diverged"),
    ],
)
def test_settings_that_do_not_fit_the_base_are_refused(
    settings: TrainSettings, change: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        train(settings.changed(epochs=1, **change))
    assert caught.value.field == field
    assert list(settings.run.out.parent.iterdir()) == []


def test_only_the_named_targets_are_adapted(settings: TrainSettings) -> None:
    train(settings.changed(epochs=1, target_modules=("query", "value")))
    names = {name for name in load_file(settings.run.out / "adapter_model.safetensors") if "lora_" in name}
    assert len(names) == 2 * 2 * 2
    assert all(".query." in name or ".value." in name for name in names)


def test_a_base_that_is_no_model_is_refused(settings: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match="is not a folder"):
        train(settings.changed(base=str(tmp_path / "absent")))
    with pytest.raises(BaseModelUnsupported, match="cannot be loaded"):
        train(settings.changed(base=str(tmp_path)))
    train(settings.changed(epochs=1))
    with pytest.raises(BaseModelUnsupported, match="holds an adapter"):
        train(settings.changed(base=str(settings.run.out), out=tmp_path / "other"))


def test_bad_rows_are_refused_before_the_base_is_loaded(settings: TrainSettings, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nt,\n")
    with pytest.raises(TrainingDataInvalid, match=r"bad\.csv:2: label is empty"):
        train(settings.changed(train=bad, base="/absent"))


def test_the_command_prints_each_epoch_and_where_the_adapter_is(settings: TrainSettings) -> None:
    arguments = [
        *("classify", "--base", settings.base, "--train", str(settings.data.train), "--out", str(settings.run.out)),
        *("--valid", str(settings.data.valid), "--epochs", "2", "--rank", "4", "--max-length", "16"),
    ]
    result = CliRunner().invoke(train_app, arguments)
    assert result.exit_code == 0, result.output
    assert "90 training rows, 40 validation rows, 3 labels (animals, colours, metals)" in result.output
    assert "epoch 2/2" in result.output
    assert "macro-F1" in result.output
    assert f"adapter written to {settings.run.out}" in result.output
    again = CliRunner().invoke(train_app, arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith(f"error: out: {settings.run.out} is not empty")
