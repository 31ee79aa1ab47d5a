"""`multilora adapters inspect`: what a folder is, every problem at once, and a verdict that scripts can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.inspect import Inspection, inspect_adapter
from server.cli_adapters import adapters_app
from tests.oracle import make_adapter
from tests.unit.base_specs import spec_of
from tests.unit.peft_folders import CONFIG, NO_LIMIT, WEIGHTS, change_config, change_tensors, drop, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("bert", "SEQ_CLS", tmp_path / "news", use_dora=True, use_rslora=True, target_modules=["query", "value"])


def codes(report: Inspection) -> list[str]:
    return [problem.code for problem in report.problems]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(adapters_app, ["inspect", *arguments])


def test_a_report_says_what_the_folder_is_and_what_it_costs(folder: Path) -> None:
    base = spec_of("bert")
    report = inspect_adapter(folder, base)
    checkpoint = read_checkpoint(folder, base, NO_LIMIT)
    assert report.loadable
    assert (report.task, report.task_type, report.base) == ("classify", "SEQ_CLS", base.name)
    assert {"DoRA", "rsLoRA"} <= set(report.variants)
    assert {module.rank for module in report.modules} == {4}
    assert all(set(module.changes) >= {"lora", "gain"} for module in report.modules)
    assert [module.scaling for module in report.modules] == [weights.scaling for weights in checkpoint.sites]
    assert report.head["classifier.weight"] == checkpoint.params["classifier.weight"].shape
    assert report.labels == checkpoint.card.labels
    assert report.digest == checkpoint.digest
    assert report.num_bytes == 4 * checkpoint.num_parameters


def test_without_a_base_the_folder_alone_is_judged(folder: Path) -> None:
    report = inspect_adapter(folder, None)
    assert report.loadable
    assert (report.base, report.digest, report.task) == (None, None, "classify")
    change_tensors(folder, lambda tensors: next(iter(tensors.values())).view(-1)[0].fill_(float("nan")))
    assert codes(inspect_adapter(folder, None)) == ["NOT_FINITE"]


def test_every_problem_is_told_at_once_and_none_of_them_twice(folder: Path) -> None:
    change_config(folder, lora_alpha="much", layer_replication=[[0, 1]])
    drop(folder, "layer.0.attention.self.query.lora_B.weight")
    report = inspect_adapter(folder, spec_of("bert"))
    assert len(report.problems) == len({(p.code, p.where) for p in report.problems})
    assert not report.loadable


def test_a_wrong_tensor_is_wrong_and_not_missing_too(folder: Path) -> None:
    change_config(folder, r=5)
    report = inspect_adapter(folder, spec_of("bert"))
    assert set(codes(report)) == {"SHAPE_MISMATCH"}
    assert len(report.problems) == 4  # query and value of two layers


@pytest.mark.parametrize("spoil", ["gone", "text", "empty"])
def test_what_is_no_adapter_is_a_problem_and_no_error(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "thing"
    if spoil == "text":
        path.write_text("not a folder")
    elif spoil == "empty":
        path.mkdir()
    assert len(inspect_adapter(path, None).problems) == 1


def test_the_command_prints_the_verdict_and_exits_by_it(folder: Path) -> None:
    good = run(str(folder))
    assert good.exit_code == 0
    for words in ("DoRA", "rsLoRA", "*.attention.self.query", "loadable", "--base checks it"):
        assert words in good.output
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    bad = run(str(folder))
    assert bad.exit_code == 1
    assert "PICKLE" in bad.output
    assert "not loadable" in bad.output


def test_json_is_one_object_with_the_same_verdict(folder: Path) -> None:
    good = json.loads(run(str(folder), "--json").output)
    assert good["loadable"] is True
    assert good["modules"][0]["rank"] == 4
    (folder / CONFIG).write_text("{")
    done = run(str(folder), "--json")
    assert done.exit_code == 1
    bad = json.loads(done.output)
    assert (bad["loadable"], bad["problems"][0]["code"]) == (False, "JSON_INVALID")


def test_a_real_base_is_loaded_and_compared(tiny_bert: Path, encoder_path: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_bert, tmp_path / "news")
    assert run(str(adapter), "--base", str(tiny_bert)).exit_code == 0
    other = run(str(adapter), "--base", str(encoder_path))
    assert other.exit_code == 1
    assert "SHAPE_MISMATCH" in other.output


def test_a_base_that_is_none_is_the_commands_fault(folder: Path, tmp_path: Path) -> None:
    done = run(str(folder), "--base", str(tmp_path / "nothing"))
    assert done.exit_code == 2
    assert "is not a folder" in done.output


def test_the_command_is_listed() -> None:
    from server.cli import app

    command: Any = get_command(app)
    assert command.get_command(None, "adapters") is not None
