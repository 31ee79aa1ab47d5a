"""The README says what is so."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from lora_runtime.sampling.finish import FinishReason
from server.cli import app
from server.metrics.series import SERIES
from tests.benchmarks.render import ROOT, render

COMMANDS = {"serve", "train", "extract", "compress", "demo", "bench", "adapters", "generate", "translate", "chat"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_figure_comes_from_a_committed_result() -> None:
    assert render(README) == README, "run: python -m tests.benchmarks.render"


def test_every_command_named_exists() -> None:
    group = get_command(app)
    named = set(re.findall(r"multilora (\w+)", README)) - {"encoder"}
    for name in named & COMMANDS:
        assert group.get_command(None, name) is not None  # pyright: ignore
    assert named >= COMMANDS


def test_every_flag_named_exists() -> None:
    """Ours, the benchmarks' and the recipes', pip's and pytest's of the test command, and torchrun's."""
    folders = ("benchmarks", "recipes")
    benchmarks = [path.read_text(encoding="utf-8") for name in folders for path in (ROOT / "tests" / name).glob("*.py")]
    known = {
        "--help",
        "--dist",
        "--nproc-per-node",
        "--no-compile",
        *flags_of(get_command(app)),
        *re.findall(r'add_argument\(\s*"(--[a-z-]+)"', "".join(benchmarks)),
    }
    assert set(re.findall(r"(?<=[\s`(])--[a-z][a-z-]+", README)) <= known


def test_every_adapter_command_has_a_row() -> None:
    group = get_command(app).get_command(None, "adapters")  # pyright: ignore
    table = "".join(line for line in README.splitlines() if line.startswith("| `") and re.search("Adapter|Alias", line))
    assert {name for name in group.list_commands(None) if f"`{name}`" not in table} == {"inspect"}


def test_every_metric_named_exists() -> None:
    assert set(re.findall(r"multilora_[a-z_]+", README)) == set(SERIES)


def test_every_way_that_a_generation_ends_is_in_the_help() -> None:
    text = SERIES["multilora_finished_samples_total"].help
    assert set(re.findall("[a-z_]+", text[text.index("(") : text.index(")")])) == set(FinishReason)


def flags_of(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for name in getattr(command, "list_commands", lambda _: [])(None):
        yield from flags_of(command.get_command(None, name))


def test_extras_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.?\[(\w+)\]'", README)) <= set(extras)
