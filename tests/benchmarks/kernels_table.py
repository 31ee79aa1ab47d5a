"""The README's table of `python -m tests.benchmarks.kernels`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tests.benchmarks.adapters_table import spread
from tests.benchmarks.kernels_problem import SHAPES, cases_of

RESULTS = Path(__file__).parent / "results"
CUDA_COMMAND = "python -m tests.benchmarks.kernels --device cuda --dtype bfloat16"

_BUSY = " (other work ran at the same time: read the spreads, not the digits)"
_LAUNCHES = {"graph": "CUDA graphs", "eager": "Python"}
_OTHERS = {
    "merged": "weights merged (one adapter only)",
    "loop": "loop over adapters, `addmm`",
    "padded_bmm": "padded `bmm`, matrices gathered",
    "gather_rows": "`index_select` per row, `bmm`",
    "grouped_mm": "`grouped_mm`, stack kept",
    "peft": "PEFT `adapter_names`",
    "polylora": "PolyLoRA",
    "vllm": "vLLM's Triton kernels",
}


def kernels_table(name: str, result: dict[str, Any]) -> str:
    """The cases of the quick run one by one, then ours against each other way over all cases of the file."""
    cases, ratios = result["cases"], result["ratios"]
    shown = {case.name for shapes in SHAPES.values() for shape in shapes for case in cases_of(shape, quick=True)}
    lines = ["| module and batch | base alone | ours ÷ base | adapters new in this step ÷ base |", "|---|---|---|---|"]
    lines += [_case_row(case, ratios) for case in cases if case["name"] in shown]
    if not (RESULTS / "kernels-cuda.json").exists():
        lines.append(f"| every module on a GPU | not measured: `{CUDA_COMMAND}` | | |")
    lines += ["", f"| ours ÷ another way, over {len(cases)} batches | median | best | worst | ours is faster in |"]
    lines += ["|---|---|---|---|---|", *(_other_row(other, result) for other in _OTHERS), ""]
    return "\n".join([*lines, _provenance(name, result), ""])


def _case_row(case: dict[str, Any], ratios: dict[str, Any]) -> str:
    name, base = case["name"], spread(case["microseconds"]["floor"], 0, 1, " µs")
    own, first = (spread(ratios[f"{name}: {which} / floor"], 2) for which in ("own", "own_first"))
    return f"| {name} | {base} | {own} | {first} |"


def _other_row(other: str, result: dict[str, Any]) -> str:
    pair = f": own / {other}"
    found = sorted((ratio["median"], key) for key, ratio in result["ratios"].items() if key.endswith(pair))
    if not found:
        reasons = {case["not_measured"][other] for case in result["cases"]}
        return f"| {_OTHERS[other]} | not measured: {'; '.join(sorted(reasons))} | | | |"
    medians = [median for median, _ in found]
    faster = sum(median < 1 for median in medians)
    best, worst = (f"{median:.2f} ({key.removesuffix(pair)})" for median, key in (found[0], found[-1]))
    return (
        f"| {_OTHERS[other]} | {statistics.median(medians):.2f} | {best} | {worst} | "
        f"{faster} of {len(medians)} batches |"
    )


def _provenance(name: str, result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    threads = f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"
    where = f"{threads} of {machine['processor']}, caches as the call before left them"
    if (gpu := machine.get("accelerator")) is not None:
        how = f"launched by {_LAUNCHES[settings['launch']]}, {settings['l2']} L2"
        where = f"{gpu['name']}, {how}, a copy reaches {gpu['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    return (
        f"Medians (lowest to highest) of {settings['rounds']} interleaved rounds, {settings['dtype']}, {where}, "
        f"load average before the start {result['load_average']:.1f}{_BUSY if result['load_average'] > 0.5 else ''}; "
        f"{versions}. Largest relative error against float64, of all contenders: "
        f"{max(result['largest_error'].values()):.0e} (limit {result['tolerance']:.0e}). "
        f"Made by `{_command(name, settings)}`."
    )


def _command(name: str, settings: dict[str, Any]) -> str:
    words = ["python -m tests.benchmarks.kernels"]
    words += [f"--{key} {settings[key]}" for key in ("device", "dtype", "rounds", "threads")]
    words.append(f"--shapes {','.join(settings['shapes'])}")
    words += ["--quick"] if settings["quick"] else []
    words += [f"--l2 {settings['l2']} --launch {settings['launch']}"] if settings["device"] == "cuda" else []
    words += [f"--without {','.join(settings['without'])}"] if settings["without"] else []
    return " ".join([*words, f"--out tests/benchmarks/results/{name}.json"])
