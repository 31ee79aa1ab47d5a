"""The runner's benchmark refuses wrong outputs before it times anything, and its file can be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_runtime.batch import Row
from lora_runtime.model.runner import PackedRunner
from server.bench.measure import OutputsDiffer
from tests.benchmarks.compare import compare
from tests.benchmarks.runner import MANY, TOLERANCES, check_outputs, main
from tests.benchmarks.runner_problem import SHAPES, RunnerProblem

LIMIT = TOLERANCES["float32"]


def test_a_quick_run_writes_ratios_that_can_be_compared(tmp_path: Path) -> None:
    out = tmp_path / "runner.json"
    assert main(["--shapes", "tiny", "--rounds", "2", "--threads", "1", "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert case["distinct"] == {"base": 1, "identical": 1, "over 10": 2, f"over {MANY}": 2}
    assert set(case["tokens_per_second"]) == {f"{traffic}, eager" for traffic in case["distinct"]}
    assert all(0 < spread["low"] <= spread["median"] <= spread["high"] for spread in case["tokens_per_second"].values())
    assert 0 <= case["errors"]["eager"] < LIMIT
    moves = compare(result, result)
    assert {move.change for move in moves} == {0} and len(moves) == 5


@pytest.fixture(scope="module")
def problem() -> RunnerProblem:
    return RunnerProblem.make(SHAPES["tiny"], "cpu", "float32", 3, (96,))


def test_rows_are_spread_over_the_adapters_and_neighbours_share_one(problem: RunnerProblem) -> None:
    rows = problem.rows(5 * 32, problem.adapters[:2])
    assert [row.resident for row in rows] == [problem.adapters[0]] * 3 + [problem.adapters[1]] * 2


def test_a_runner_that_swaps_adapters_is_not_timed(problem: RunnerProblem) -> None:
    class Swaps(PackedRunner):
        def __init__(self) -> None:
            pass

        def run(self, rows: list[Row]) -> list[torch.Tensor]:
            order = {a: b for a, b in zip(problem.adapters, problem.adapters[1:] + problem.adapters[:1], strict=True)}
            return problem.runners["eager"].run([replace(row, resident=order[row.resident]) for row in rows])

    batches = {"spread": problem.rows(96, problem.adapters)}
    assert check_outputs(problem, batches, LIMIT)["eager"] < LIMIT
    with pytest.raises(OutputsDiffer, match=r"'graph'.*nothing was timed"):
        check_outputs(replace(problem, runners={**problem.runners, "graph": Swaps()}), batches, LIMIT)


def test_adapters_without_an_effect_prove_nothing(problem: RunnerProblem) -> None:
    with pytest.raises(OutputsDiffer, match="too little to compare"):
        check_outputs(problem, {"spread": problem.rows(96, None)}, LIMIT)


@pytest.mark.parametrize("arguments", [["--shapes", "bart"], ["--dtype", "bfloat16"], ["--device", "tpu"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
