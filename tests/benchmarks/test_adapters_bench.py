"""`multilora bench adapters` runs to its end at the small scale, and would not print a figure of wrong answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from server.bench.adapters.plan import NUM_LABELS, PARTS, SCALES
from server.bench.adapters.reference import Reference
from server.bench.adapters.replace import Replacing
from server.bench.measure import OutputsDiffer
from server.cli_bench import bench_app
from server.pb.multilora.v1 import inference_pb2
from tests.benchmarks.adapters_table import adapters_table

LOGITS = np.arange(2 * 3 * NUM_LABELS, dtype=np.float32).reshape(2, 3, NUM_LABELS)
TEXTS = ("one", "two", "three")


def reply(version: int, logits: np.ndarray) -> inference_pb2.ClassifyResponse:
    results = [inference_pb2.ClassifyResult(logits=logits.tolist())]
    return inference_pb2.ClassifyResponse(version=version, results=results)


@pytest.mark.slow
def test_every_part_completes_and_is_checked(tmp_path: Path) -> None:
    out = tmp_path / "adapters.json"
    done = CliRunner().invoke(bench_app, ["adapters", "--scale", "small", "--out", str(out)])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["parts"]) == set(PARTS)
    assert result["answers_checked"] > 300
    assert result["largest_error"] < 1e-5
    exact = [
        ("storm", "failed calls"), ("replace", "answers of neither version"), ("replace", "old answers after a move"),
        ("replace", "failed calls"), ("replace", "calls that one version alone may answer"),
        ("replace", "calls of the version answered less"), ("memory", "arena bytes ÷ parameter bytes, largest"),
        ("memory", "arena bytes after unloading all"), ("memory", "failed calls of the churn"),
        ("many", "bytes read at start ÷ bytes of weights"),
    ]  # fmt: skip
    for part, name in exact:  # the others are times, and this machine may be busy
        assert result["parts"][part]["targets"][name]["met"], (part, name)
    assert result["parts"]["replace"]["counts"]["answered"] > 20
    assert "| measured |" in adapters_table("adapters", result)


@pytest.mark.slow
def test_a_wrong_answer_ends_the_run_without_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Reference.compute

    def of_the_next_adapter(base: str, files: tuple[Path, ...], texts: tuple[str, ...]) -> Reference:
        return Reference(texts, np.roll(right(base, files, texts).logits, 1, axis=0))

    monkeypatch.setattr(Reference, "compute", of_the_next_adapter)
    out = tmp_path / "adapters.json"
    done = CliRunner().invoke(bench_app, ["adapters", "--scale", "small", "--parts", "cold", "--out", str(out)])
    assert done.exit_code == 1
    assert "with an error of" in " ".join(done.output.split())
    assert not out.exists()


def test_adapters_that_answer_alike_are_no_reference() -> None:
    with pytest.raises(OutputsDiffer, match="would not be seen"):
        Reference(TEXTS, np.stack([LOGITS[0], LOGITS[0]]))


def test_an_old_answer_after_a_move_is_counted() -> None:
    replacing = Replacing(replace(SCALES["small"], moves=1), Reference(TEXTS, LOGITS))
    replacing.count(reply(1, LOGITS[0, 2]), text=2, allowed={2})
    replacing.count(reply(2, LOGITS[1, 2]), text=2, allowed={2})
    replacing.count(reply(1, LOGITS[0, 2]), text=2, allowed={1, 2})
    assert replacing.counts["old"] == 1
    assert replacing.counts["one_version_allowed"] == 2


def test_a_version_that_answers_with_the_others_weights_is_of_neither() -> None:
    replacing = Replacing(SCALES["small"], Reference(TEXTS, LOGITS))
    replacing.count(reply(1, LOGITS[1, 0]), text=0, allowed={1, 2})
    replacing.count(reply(1, LOGITS[0, 0] + 0.5), text=0, allowed={1, 2})
    assert replacing.counts["neither"] == 2


def test_an_unknown_part_or_scale_is_refused() -> None:
    for wrong in (["--parts", "many,storms"], ["--scale", "huge"]):
        assert CliRunner().invoke(bench_app, ["adapters", *wrong]).exit_code == 2
