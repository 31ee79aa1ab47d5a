"""Tokens per second of the whole runner: `python -m tests.benchmarks.runner`, on bases of random weights.

Batches of the base alone, of one adapter, and of rows spread over few or many resident adapters, run eagerly and, on
CUDA, by graphs. Contenders take turns. Nothing is timed before each adapter's rows in a mixed batch equal the same rows
run without the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lora_runtime.batch import Row
from server.bench.measure import OutputsDiffer, Spread, ratio
from tests.benchmarks.kernels import machine_of
from tests.benchmarks.kernels_timing import Timing, time_contenders
from tests.benchmarks.result_file import write_result
from tests.benchmarks.runner_problem import RANK, ROW_TOKENS, SHAPES, RunnerProblem

NUM_TOKENS = (64, 256, 2048)
QUICK_TOKENS = (64,)
FEW, MANY = 10, 200
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # relative Frobenius, of all layers together
_LEAST_EFFECT = 4  # times the tolerance: what adapters must change at least, or a comparison would prove little
DEFAULT_SHAPES = {"cpu": ("minilm", "bert", "gpt2"), "cuda": ("minilm", "bert", "gpt2", "llama-1b")}


@dataclass(frozen=True, slots=True)
class RunnerBench:
    """What is measured."""

    device: str = "cpu"
    dtype: str = "float32"
    shapes: tuple[str, ...] = DEFAULT_SHAPES["cpu"]
    rounds: int = 7
    threads: int = 2
    quick: bool = False

    @property
    def num_tokens(self) -> tuple[int, ...]:
        return QUICK_TOKENS if self.quick else NUM_TOKENS

    @property
    def timing(self) -> Timing:
        return Timing(self.rounds, turn_seconds=0.02 if self.quick else 0.1, cold_l2=False)


def run_runner_bench(bench: RunnerBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure and return the result as plain data; raises OutputsDiffer before a case is timed when one is wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(bench.threads)
    load = os.getloadavg()[0]
    try:
        machine = machine_of(torch.device(bench.device))
        cases = [case for name in bench.shapes for case in _run_shape(bench, name, progress)]
    finally:
        torch.set_num_threads(threads)
    return {
        "benchmark": "runner",
        "settings": asdict(bench),
        "machine": machine,
        "load_average": load,
        "tolerance": TOLERANCES[bench.dtype],
        "rank": RANK,
        "tokens_per_row": ROW_TOKENS,
        "better": "higher",
        "ratios": {f"{case['name']}: {pair}": spread for case in cases for pair, spread in case.pop("ratios").items()},
        "cases": cases,
    }


def check_outputs(problem: RunnerProblem, batches: Mapping[str, list[Row]], limit: float) -> dict[str, float]:
    """The largest relative error of each way to run over all batches; raises OutputsDiffer when one is too large.

    The reference runs the rows of one adapter at a time, eagerly.
    """
    eager = problem.runners["eager"]
    errors = dict.fromkeys(problem.runners, 0.0)
    for traffic, rows in batches.items():
        apart = torch.stack(
            [one for _, own in groupby(rows, key=lambda row: row.resident) for one in eager.run([*own])]
        )
        if traffic != "base":
            base = torch.stack(eager.run([Row(row.sequence, task=row.task) for row in rows]))
            if (effect := _error(base, apart)) < _LEAST_EFFECT * limit:
                raise OutputsDiffer(f"{traffic}: adapters change {effect:.1e} of the outputs, too little to compare")
        for how, runner in problem.runners.items():
            errors[how] = max(errors[how], _error(torch.stack(runner.run(rows)), apart))
    if wrong := {how: error for how, error in errors.items() if not error <= limit}:
        raise OutputsDiffer(f"outputs differ from one adapter at a time (limit {limit}): {wrong}; nothing was timed")
    return errors


def _run_shape(bench: RunnerBench, name: str, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    problem = RunnerProblem.make(SHAPES[name], bench.device, bench.dtype, MANY, bench.num_tokens)
    return [_run_case(bench, f"{name}, {n} tokens", problem, n, progress) for n in bench.num_tokens]


def _run_case(
    bench: RunnerBench, name: str, problem: RunnerProblem, num_tokens: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    batches = {
        "base": problem.rows(num_tokens, None),
        "identical": problem.rows(num_tokens, problem.adapters[:1]),
        f"over {FEW}": problem.rows(num_tokens, problem.adapters[:FEW]),
        f"over {MANY}": problem.rows(num_tokens, problem.adapters),
    }
    errors = check_outputs(problem, batches, TOLERANCES[bench.dtype])
    runs = {
        f"{traffic}, {how}": partial(runner.run, rows)
        for traffic, rows in batches.items()
        for how, runner in problem.runners.items()
    }
    before = {how: runner.stats() for how, runner in problem.runners.items()}
    seconds = time_contenders(runs, torch.device(bench.device), bench.timing)
    after = {how: runner.stats() for how, runner in problem.runners.items()}
    speeds = {run: Spread.of([num_tokens / s for s in found]) for run, found in seconds.items()}
    progress(f"{name}: " + ", ".join(f"{run} {speed.median:,.0f} tokens/s" for run, speed in speeds.items()))
    return {
        "name": name,
        "tokens": num_tokens,
        "distinct": {traffic: len({row.resident for row in rows}) for traffic, rows in batches.items()},
        "backend": problem.backend,
        "errors": errors,
        "compiled_while_timed": {how: after[how].num_compiled - before[how].num_compiled for how in problem.runners},
        "replayed": {how: after[how].replayed_steps - before[how].replayed_steps for how in problem.runners},
        "eager_for": {how: dict(after[how].eager_steps) for how in problem.runners},
        "tokens_per_second": {run: asdict(speed) for run, speed in speeds.items()},
        "ratios": {f"{a} / {b}": asdict(ratio(seconds, a, b)) for a, b in _pairs([*batches], [*problem.runners])},
    }


def _pairs(traffic: list[str], ways: list[str]) -> list[tuple[str, str]]:
    """Each traffic against the base's, spread against identical, and graphs against eager."""
    base, identical, *spread = traffic
    pairs = [(f"{what}, {how}", f"{base}, {how}") for how in ways for what in (identical, *spread)]
    pairs += [(f"{what}, {how}", f"{identical}, {how}") for how in ways for what in spread]
    return pairs + [(f"{what}, graph", f"{what}, eager") for what in traffic if "graph" in ways]


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return error if error == error else float("inf")


def _parse(arguments: Sequence[str] | None) -> tuple[RunnerBench, Path]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.runner", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=[*TOLERANCES], default="float32")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="batches of one size instead of three")
    parser.add_argument("--out", type=Path, help="default: tests/benchmarks/results/runner-DEVICE.json")
    options = parser.parse_args(arguments)
    shapes = tuple(options.shapes.split(",")) if options.shapes else DEFAULT_SHAPES[options.device]
    if unknown := [name for name in shapes if name not in SHAPES]:
        parser.error(f"{unknown[0]!r} is not known; choose from {', '.join(SHAPES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device that torch can use")
    if options.device == "cpu" and options.dtype != "float32":
        parser.error("the CPU serves float32; measure other dtypes on cuda")
    bench = RunnerBench(options.device, options.dtype, shapes, options.rounds, options.threads, options.quick)
    return bench, options.out or Path(__file__).parent / "results" / f"runner-{options.device}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the file; 1 when outputs were wrong."""
    bench, out = _parse(arguments)
    return write_result(partial(run_runner_bench, bench), out)


if __name__ == "__main__":
    sys.exit(main())
