"""What is configured is run: lint, format, types, layers. One test each, so that a failure names its tool."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400


def run(*command: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", ".")


def test_files_are_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_types_are_strict() -> None:
    run("basedpyright", "--pythonpath", sys.executable)


def test_layers_hold() -> None:
    run("lint-imports")


def sources() -> list[Path]:
    found = [p for folder in ("server", "lora_runtime") for p in (ROOT / folder).rglob("*.py")]
    return [path for path in found if "pb" not in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_scheduler_is_short_and_knows_no_torch() -> None:
    text = (ROOT / "lora_runtime" / "scheduler.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    assert "torch" not in text


def test_every_dependency_is_justified() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *(d for e in project["optional-dependencies"].values() for d in e)]
    lines = {line.split('"')[1]: line for line in text.splitlines() if line.strip().startswith('"')}
    for dependency in wanted:
        if dependency.startswith("multilora[") and dependency != "multilora[train]":
            continue
        assert dependency in text
        assert dependency.startswith("multilora[") or "#" in lines[dependency], f"{dependency} has no reason beside it"
