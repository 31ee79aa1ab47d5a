"""`multilora bench tenants` runs to its end at the small scale, and would not print a figure of wrong answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from server.bench.adapters.reference import Reference
from server.bench.tenants.asking import OK, Outcome, Texts, texts_per_s
from server.bench.tenants.plan import PARTS
from server.cli_bench import bench_app
from tests.benchmarks.tenants_table import tenants_table


def outcome(code: str, ended: float) -> Outcome:
    return Outcome(code, due=0.0, sent=0.5, ended=ended, num_texts=8)


@pytest.mark.slow
def test_every_part_completes_and_is_checked(tmp_path: Path) -> None:
    out = tmp_path / "tenants.json"
    done = CliRunner().invoke(bench_app, ["tenants", "--scale", "small", "--threads", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["parts"]) == set(PARTS)
    assert result["answers_checked"] > 50
    assert result["largest_error"] < 1e-5
    exact = [
        ("noisy", "failed calls of steady tenants"), ("cancels", "cancelled calls"), ("cancels", "expired deadlines"),
        ("cancels", "admitted sequences, tenants' requests and sequences, engine's tickets left"),
        ("cancels", "calls of a tenant's whole limit refused afterwards"),
    ]  # fmt: skip
    for part, name in exact:  # the others are times, and this machine may be busy
        assert result["parts"][part]["targets"][name]["met"], (part, name)
    assert "| measured |" in tenants_table("tenants", result)


@pytest.mark.slow
def test_an_answer_of_another_tenant_ends_the_run_without_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Reference.compute

    def of_the_next_tenant(base: str, files: tuple[Path, ...], texts: tuple[str, ...]) -> Reference:
        return Reference(texts, np.roll(right(base, files, texts).logits, 1, axis=0))

    monkeypatch.setattr(Reference, "compute", of_the_next_tenant)
    out = tmp_path / "tenants.json"
    done = CliRunner().invoke(bench_app, ["tenants", "--scale", "small", "--parts", "shares", "--out", str(out)])
    assert done.exit_code == 1
    assert "with an error of" in " ".join(done.output.split())
    assert not out.exists()


def test_only_what_is_answered_within_the_window_counts() -> None:
    outcomes = [outcome(OK, 1.5), outcome(OK, 2.0), outcome(OK, 0.9), outcome("DEADLINE_EXCEEDED", 1.5)]
    assert texts_per_s(outcomes, 1.0, 2.0) == 8.0


def test_a_late_client_does_not_hide_a_wait() -> None:
    assert outcome(OK, 2.0).seconds == 2.0


def test_arrivals_come_at_their_rate() -> None:
    arrivals = Texts(0, 4).arrivals(50.0, 10.0, 110.0)
    assert len(arrivals) == pytest.approx(5000, rel=0.05)
    assert min(arrivals) >= 10.0 and max(arrivals) < 110.0


def test_an_unknown_part_or_scale_is_refused() -> None:
    for wrong in (["--parts", "noisy,cancel"], ["--scale", "huge"]):
        assert CliRunner().invoke(bench_app, ["tenants", *wrong]).exit_code == 2
