"""One module of a model with many adapters, by every way there is: `python -m tests.benchmarks.kernels`.

Every contender's outputs are compared with the reference in float64 before anything is timed; a wrong one ends the
run. Contenders take turns in every round. Each computes the base linears too, so a time is that of a whole module.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from lora_runtime.model.capture import Captured, CudaCapture
from server.bench.measure import OutputsDiffer, Spread, describe_machine
from tests.benchmarks.kernels_contenders import TORCH_CONTENDERS, Contender, NotMeasured, Turn
from tests.benchmarks.kernels_others import OTHER_CONTENDERS
from tests.benchmarks.kernels_problem import SHAPES, Case, Problem, cases_of
from tests.benchmarks.kernels_timing import Timing, copy_bytes_per_second, time_contenders
from tests.benchmarks.result_file import write_result

CONTENDERS: dict[str, Contender] = {**TORCH_CONTENDERS, **OTHER_CONTENDERS}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}  # relative Frobenius, against float64
OPTIONAL_PACKAGES = ("triton", "polylora", "vllm")
DEFAULT_SHAPES = {"cpu": ("minilm", "bert", "gpt2"), "cuda": tuple(SHAPES)}
_LEAST_EFFECT = 0.1  # what the deltas must change at least, relative: below, a comparison would prove little


@dataclass(frozen=True, slots=True)
class KernelBench:
    """What is measured."""

    device: str = "cpu"
    dtype: str = "float32"
    shapes: tuple[str, ...] = DEFAULT_SHAPES["cpu"]
    rounds: int = 7
    threads: int = 2
    quick: bool = False
    l2: str | None = None  # "cold" or "warm" on a GPU; a CPU's caches hold what the call before left
    without: tuple[str, ...] = ()  # contenders left out
    launch: str = "eager"  # on a GPU also "graph": what a call launches is captured, and replayed while it is timed

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def timing(self) -> Timing:
        return Timing(self.rounds, turn_seconds=0.002 if self.quick else 0.005, cold_l2=self.l2 == "cold")

    def cases(self) -> list[Case]:
        return [case for name in self.shapes for shape in SHAPES[name] for case in cases_of(shape, quick=self.quick)]


def run_kernel_bench(
    bench: KernelBench,
    progress: Callable[[str], None],
    contenders: Mapping[str, Contender] = CONTENDERS,
    cases: Sequence[Case] | None = None,
) -> dict[str, Any]:
    """Measure and return the result as plain data; raises OutputsDiffer before a case is timed when one is wrong."""
    device = torch.device(bench.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(bench.threads)
    load = os.getloadavg()[0]
    try:
        machine = machine_of(device)
        chosen = {name: contender for name, contender in contenders.items() if name not in bench.without}
        with torch.inference_mode():
            done = [
                _run_case(bench, case, chosen, machine, progress)
                for case in (bench.cases() if cases is None else cases)
            ]
    finally:
        torch.set_num_threads(threads)
    return {
        "benchmark": "kernels",
        "settings": asdict(bench),
        "machine": machine,
        "load_average": load,  # of the minute before: what else the machine was doing
        "tolerance": TOLERANCES[bench.torch_dtype],
        "largest_error": {
            name: max(case["errors"][name] for case in done if name in case["errors"])
            for name in chosen
            if any(name in case["errors"] for case in done)
        },
        "better": "lower",
        "ratios": {f"{case['name']}: {pair}": spread for case in done for pair, spread in case.pop("ratios").items()},
        "cases": done,
    }


def check_contenders(problem: Problem, turns: Mapping[str, Turn]) -> dict[str, float]:
    """Relative error of each turn against float64; raises OutputsDiffer when one is too large or proves nothing."""
    exact = {adapted: problem.exact(adapted=adapted) for adapted in (True, False)}
    effect = _error(exact[False], exact[True])
    if effect < _LEAST_EFFECT:
        raise OutputsDiffer(f"{problem.case.name}: adapters change {effect:.1e} of the outputs, too little to compare")
    errors: dict[str, float] = {}
    for name, turn in turns.items():
        first, later = (_packed(problem, turn) for _ in range(2))  # a later call may use what the first one kept
        errors[name] = max(_error(first, exact[turn.adapted]), _error(later, exact[turn.adapted]))
    limit = TOLERANCES[problem.dtype]
    if wrong := {name: error for name, error in errors.items() if not error <= limit}:
        raise OutputsDiffer(
            f"{problem.case.name}: outputs differ from the reference (limit {limit}): {wrong}; it was not timed"
        )
    return errors


def _run_case(
    bench: KernelBench,
    case: Case,
    contenders: Mapping[str, Contender],
    machine: Mapping[str, Any],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    device = torch.device(bench.device)
    problem = Problem.make(case, device, bench.torch_dtype)
    capture = CudaCapture(device) if bench.launch == "graph" else None
    turns, not_measured = _turns(problem, contenders, capture)
    not_measured |= dict.fromkeys(bench.without, "left out by --without")
    errors = check_contenders(problem, turns)
    seconds = time_contenders({name: turn.run for name, turn in turns.items()}, device, bench.timing)
    spreads = {name: Spread.of([1e6 * s for s in of_rounds]) for name, of_rounds in seconds.items()}
    progress(f"{case.name}: " + ", ".join(f"{name} {spread.median:.0f} us" for name, spread in spreads.items()))
    result = {
        "name": case.name,
        "shape": {"name": case.shape.name, "d_in": case.shape.d_in, "d_outs": list(case.shape.d_outs)},
        "kind": case.kind,
        "tokens": case.num_tokens,
        "adapters": case.num_adapters,
        "ranks": case.ranks_text,
        "errors": errors,
        "not_measured": not_measured,
        "microseconds": {name: asdict(spread) for name, spread in spreads.items()},
        "ratios": {f"{a} / {b}": asdict(time_ratio(seconds, a, b)) for a, b in _pairs(seconds)},
    }
    if device.type == "cuda":
        result["bandwidth"] = bandwidth(problem, seconds, machine["accelerator"]["copy_bytes_per_second"])
    return result


def time_ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> Spread:
    """Time of `over` divided by time of `under`, round by round."""
    return Spread.of([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])


def _pairs(measured: Mapping[str, object]) -> list[tuple[str, str]]:
    """Ours against all others; the first call of new adapters against the floor alone."""
    pairs = [("own", other) for other in measured if other not in ("own", "own_first")]
    return [*pairs, *([("own_first", "floor")] if "own_first" in measured else [])]


def _turns(
    problem: Problem, contenders: Mapping[str, Contender], capture: CudaCapture | None
) -> tuple[dict[str, Turn], dict[str, str]]:
    turns: dict[str, Turn] = {}
    not_measured: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            turn = contender(problem)
            turns[name] = turn if capture is None else _captured(turn, capture)
        except NotMeasured as reason:
            not_measured[name] = str(reason)
    return turns, not_measured


def _captured(turn: Turn, capture: CudaCapture) -> Turn:
    """What a call launches, without the host's time for it; raises NotMeasured where that is not the whole of it."""
    if turn.on_host:
        raise NotMeasured("the host makes part of each call's input; see --launch eager")
    call = turn.run
    try:
        captured = capture.capture(call)
    except RuntimeError as error:
        raise NotMeasured(f"a CUDA graph cannot capture it: {str(error).strip().splitlines()[0]}") from error
    return replace(turn, run=partial(_replay, captured, call))


def _replay(captured: Captured, _kept: object) -> list[torch.Tensor]:
    """`_kept`: the call that was captured, whose tensors the graph reads."""
    return cast("list[torch.Tensor]", captured.replay())


def _packed(problem: Problem, turn: Turn) -> list[torch.Tensor]:
    return [problem.unpad(out) for out in turn.run()] if turn.padded else turn.run()


def _error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest relative Frobenius error of the sites; NaN counts as infinite."""
    errors = [float((f.double() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def bandwidth(problem: Problem, seconds: Mapping[str, list[float]], available: float) -> dict[str, Any]:
    """Bytes that must move at least, per second of each contender, and as a share of what a copy reaches."""
    achieved = {name: Spread.of([problem.least_bytes / s for s in found]) for name, found in seconds.items()}
    return {
        "least_bytes": problem.least_bytes,
        "bytes_per_second": {name: asdict(spread) for name, spread in achieved.items() if name != "floor"},
        "share_of_copy": {name: spread.median / available for name, spread in achieved.items() if name != "floor"},
    }


def machine_of(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on, the accelerator too."""
    machine = describe_machine()
    machine["versions"] = {**_versions(machine), **{name: _version(name) for name in OPTIONAL_PACKAGES}}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["accelerator"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "copy_bytes_per_second": copy_bytes_per_second(device),
        }
    return machine


def _versions(machine: Mapping[str, object]) -> dict[str, str]:
    versions = machine["versions"]
    assert isinstance(versions, dict)
    return versions


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _parse(arguments: Sequence[str] | None) -> tuple[KernelBench, Path]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in TOLERANCES], default="float32")
    parser.add_argument(
        "--shapes", help=f"of {', '.join(SHAPES)}, separated by commas; the Llamas only on cuda if absent"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="four batches of each module instead of nineteen")
    parser.add_argument("--l2", choices=("cold", "warm"), default="cold", help="on cuda: overwritten before each call")
    parser.add_argument("--launch", choices=("graph", "eager"), default="graph", help="on cuda: by CUDA graphs or not")
    parser.add_argument("--without", default="", help=f"of {', '.join(CONTENDERS)}, separated by commas")
    parser.add_argument("--out", type=Path, help="default: tests/benchmarks/results/kernels-DEVICE.json")
    options = parser.parse_args(arguments)
    shapes = tuple(options.shapes.split(",")) if options.shapes else DEFAULT_SHAPES[options.device]
    without = tuple(name for name in options.without.split(",") if name)
    for given, known in ((shapes, SHAPES), (without, CONTENDERS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is not known; choose from {', '.join(known)}")
    if needed := {"floor", "own"} & set(without):
        parser.error(f"{sorted(needed)[0]} cannot be left out: every ratio needs it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device that torch can use")
    on_gpu = options.device == "cuda"
    bench = KernelBench(
        options.device, options.dtype, shapes, options.rounds, options.threads, options.quick,
        options.l2 if on_gpu else None, without, options.launch if on_gpu else "eager",
    )  # fmt: skip
    return bench, options.out or Path(__file__).parent / "results" / f"kernels-{options.device}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the file; 1 when a contender was wrong."""
    bench, out = _parse(arguments)
    return write_result(partial(run_kernel_bench, bench), out)


if __name__ == "__main__":
    sys.exit(main())
