"""The README says what is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from typer.main import get_command

from server.cli import app
from tests.benchmarks.render import ROOT, render

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_figure_comes_from_a_committed_result() -> None:
    assert render(README) == README, "run: python -m tests.benchmarks.render"


def test_every_command_named_exists() -> None:
    group = get_command(app)
    named = set(re.findall(r"multilora (\w+)", README)) - {"encoder"}
    for name in named & {"serve", "train", "demo", "bench", "adapters"}:
        assert group.get_command(None, name) is not None  # pyright: ignore
    assert {"serve", "train", "demo", "bench", "adapters"} <= named


def test_every_flag_named_exists() -> None:
    root = Path(ROOT)
    sources = "".join(path.read_text() for path in (root / "server").glob("cli*.py"))
    for flag in set(re.findall(r"(?<=\s)--([a-z][a-z-]+)", README)):
        assert flag in ("help",) or flag.replace("-", "_") in sources, flag


def test_extras_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.?\[(\w+)\]'", README)) <= set(extras)
