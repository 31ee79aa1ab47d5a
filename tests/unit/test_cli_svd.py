"""`multilora extract` and `multilora compress` as they are typed: tables, reports, and refusals in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lora_runtime.adapters.metadata import read_metadata
from lora_runtime.types import Task
from server.cli import app
from tests.svd_models import Pair, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("models"), "bert")


def multilora(*arguments: object, columns: int = 200) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


def extract(pair: Pair, out: Path, *arguments: object) -> Result:
    return multilora("extract", "--base", pair.base, "--tuned", pair.tuned, "--out", out, *arguments)


def test_an_extraction_shows_each_site_what_is_carried_and_where_it_lies(pair: Pair, tmp_path: Path) -> None:
    done = extract(pair, tmp_path / "adapter", "--rank", 4, "--threads", 1)
    assert done.exit_code == 0, done.output
    (row,) = [line.split() for line in done.stdout.splitlines() if "layer.1.intermediate.dense " in line]
    assert row[1:3] == ["48×32", "4"]
    assert row[3].endswith("%")
    assert "classifier: the head, whole, relative change new" in done.stdout
    assert "NOT carried" not in done.stdout
    assert "15 sites for the task classify" in done.stdout
    assert f"adapter written to {tmp_path / 'adapter'}" in done.stdout
    metadata = read_metadata(tmp_path / "adapter")
    assert metadata is not None
    assert metadata.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_what_is_not_carried_is_said_loudly(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    done = extract(pair, out, "--rank", 4, "--targets", "query, value", "--task", "embed", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "NOT carried (14): the adapter answers without these changes" in done.stdout
    assert "classifier.weight: is no single parameter of BertModel" in done.stdout
    assert "encoder.layer.0.attention.self.key.weight: is none of the targets; relative change" in done.stdout
    metadata = read_metadata(out)
    assert metadata is not None
    assert metadata.task is Task.EMBED


def test_reports_of_both_commands_are_written(pair: Pair, tmp_path: Path) -> None:
    assert extract(pair, tmp_path / "a", "--energy", 0.9, "--report", tmp_path / "report").exit_code == 0
    done = multilora(
        "compress", "--adapter", tmp_path / "a", "--out", tmp_path / "b", "--rank", 2, "--report", tmp_path / "report"
    )
    assert done.exit_code == 0, done.output
    names = {f"{command}.{ending}" for command in ("extract", "compress") for ending in ("json", "md", "png")}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    found = json.loads((tmp_path / "report" / "extract.json").read_text())
    for site in found["sites"]:
        curve = {int(rank): energy for rank, energy in site["energy_at"].items()}
        assert curve[site["rank"]] == pytest.approx(site["energy"]) and site["energy"] >= 0.9
        assert sorted(curve.values()) == list(curve.values())
        assert max(curve.values()) == pytest.approx(1)
    assert {site["old_rank"] for site in json.loads((tmp_path / "report" / "compress.json").read_text())["sites"]} == {
        site["rank"] for site in found["sites"]
    }
    text = (tmp_path / "report" / "extract.md").read_text()
    assert text.count("| bert.encoder.layer") == 12 + 4 + 12  # sites, norms, biases
    assert "Nothing was left behind." in text
    for name in ("extract.png", "compress.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "rank: give either a rank or an energy"),
        (("--rank", 4, "--energy", 0.5), "rank: give either a rank or an energy"),
        (("--energy", 2), "energy: is 2; it is a share above 0"),
        (("--rank", 4, "--targets", "q_proj"), "targets: 'q_proj' is the ending of no linear layer"),
        (("--rank", 4, "--targets", ","), "targets: names nothing"),
        (("--rank", 4, "--task", "generate"), "task: transformers has no class to generate with bert"),
        (("--rank", 4, "--threads", 0), "threads: is 0; it is 1 or more"),
        (("--rank", 4, "--base", "absent"), "base absent: is no folder; give that of a model"),
        (("--rank", 4, "--tuned", __file__), "is a file, not a folder"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(
    pair: Pair, tmp_path: Path, arguments: tuple[object, ...], says: str
) -> None:
    done = extract(pair, tmp_path / "out" / "adapter", *arguments)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert says in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_folder_in_use_is_kept_unless_it_may_be_replaced(pair: Pair, tmp_path: Path) -> None:
    assert extract(pair, tmp_path / "a", "--rank", 2).exit_code == 0
    done = extract(pair, tmp_path / "a", "--rank", 3)
    assert done.exit_code == 1
    assert "is not empty" in done.stderr
    assert extract(pair, tmp_path / "a", "--rank", 3, "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 3
    in_place = multilora("compress", "--adapter", tmp_path / "a", "--out", tmp_path / "a", "--rank", 1, "--overwrite")
    assert in_place.exit_code == 0, in_place.output
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 1


def test_compressing_what_is_no_adapter_is_one_line(pair: Pair, tmp_path: Path) -> None:
    done = multilora("compress", "--adapter", pair.tuned, "--out", tmp_path / "b", "--rank", 2)
    assert done.exit_code == 1
    assert done.stderr == "error: adapter_model.safetensors: is not in the folder; save the adapter with PEFT\n"


def test_a_report_without_matplotlib_names_the_command_before_any_work(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    done = extract(pair, tmp_path / "a", "--rank", 2, "--report", tmp_path / "report")
    assert done.exit_code == 1
    assert "pip install '.[plots]'" in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("command", ["extract", "compress"])
def test_help_fits_into_80_columns(command: str) -> None:
    done = multilora(command, "--help", columns=80)
    assert done.exit_code == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    for flag in ("--rank", "--energy", "--max-rank", "--report", "--overwrite"):
        assert flag in done.stdout
