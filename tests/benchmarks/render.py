"""Writes the README's tables: `python -m tests.benchmarks.render`.

Figures come from the committed result files, the variants from the code's registry, the families from the tests, the
metrics from the table in which they are declared.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lora_runtime.adapters.variants import support_table
from tests.benchmarks.adapters_table import adapters_table
from tests.benchmarks.generate_table import generate_table
from tests.benchmarks.kernels_table import kernels_table
from tests.benchmarks.metrics_table import metrics_table
from tests.benchmarks.quantized_table import quantized_table
from tests.benchmarks.runner_table import runner_table
from tests.benchmarks.tenants_table import tenants_table
from tests.benchmarks.training_table import training_table
from tests.conformance.cases import CASES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
_BLOCK = re.compile(r"(<!-- (?P<kind>result|table) (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

_CONTENDERS = {
    "own_base": "multilora, base alone, packed",
    "own_mixed": "multilora, every text its own adapter and head",
    "own_engine": "multilora, the same through the engine's queue",
    "transformers_base": "transformers, base alone, padded and sorted by length",
    "peft_mixed": "PEFT `adapter_names`, padded and sorted by length",
}

_RATIOS = {
    "own_mixed / own_base": "mixed adapters ÷ our base alone",
    "own_mixed / peft_mixed": "mixed adapters ÷ PEFT's mixed adapters",
    "own_base / transformers_base": "our base alone ÷ transformers' base alone",
    "own_engine / own_mixed": "through the engine's queue ÷ batches made by hand",
}


_TASKS = {
    "SEQ_CLS": "`Classify`",
    "TOKEN_CLS": "`ClassifyTokens`",
    "QUESTION_ANS": "`AnswerQuestion`",
    "FEATURE_EXTRACTION": "`Embed`",
    "CAUSAL_LM": "next token",
}


def render(readme: str) -> str:
    """The README's text with every block from `<!-- result NAME -->` or `<!-- table NAME -->` to its end made anew."""
    return _BLOCK.sub(lambda block: block[1] + _content(block["kind"], block["name"]) + block[4], readme)


def _content(kind: str, name: str) -> str:
    return _result(name) if kind == "result" else _TABLES[name]()


def families_table() -> str:
    """How many cases of the conformance matrix prove each architecture, by task."""
    counts = Counter((case.family, case.task) for case in CASES if not case.may_be_refused)
    lines = [f"| architecture | {' | '.join(_TASKS.values())} |", "| --- |" + " --- |" * len(_TASKS)]
    lines += [
        f"| {family} | {' | '.join(str(counts[family, task] or '') for task in _TASKS)} |"
        for family in dict.fromkeys(case.family for case in CASES)
    ]
    return "\n".join([*lines, ""])


def variants_table() -> str:
    """What of PEFT is served, and what is refused and why."""
    return support_table().rstrip("\n") + "\n"


_TABLES = {"variants": variants_table, "families": families_table, "metrics": metrics_table}


def _result(name: str) -> str:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return _RESULTS[result["benchmark"]](name, result)


def encoder_table(name: str, result: dict[str, Any]) -> str:
    """Speeds of the contenders, and their ratios."""
    settings, machine, texts = result["settings"], result["machine"], result["texts"]
    lines = ["| contender | texts/s, median (low to high) |", "|---|---|"]
    lines += [f"| {_CONTENDERS[key]} | {_spread(s, 0)} |" for key, s in result["texts_per_second"].items()]
    lines += ["", "| ratio of throughput, round by round | median (low to high) |", "|---|---|"]
    lines += [f"| {_RATIOS[key]} | {_spread(s, 2)} |" for key, s in result["ratios"].items()]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    command = (
        f"multilora bench encoder --adapters {settings['num_adapters']} --rank {settings['rank']} "
        f"--targets {settings['targets']} --out tests/benchmarks/results/{name}.json"
    )
    lines += [
        "",
        f"{texts['count']} texts, median {texts['median_tokens']} tokens, {settings['num_adapters']} adapters of rank "
        f"{settings['rank']}, {settings['rounds']} interleaved rounds, fp32, {settings['threads']} threads of "
        f"{machine['processor']}; {versions}. Largest error against PEFT, one adapter and one text at a time: "
        f"{max(result['largest_error'].values()):.0e}. Loading one adapter (read, validate, copy) took "
        f"{1000 * result['load_seconds']['median']:.0f} ms in the median. Made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


_RESULTS = {
    "encoder": encoder_table,
    "adapters": adapters_table,
    "tenants": tenants_table,
    "generate": generate_table,
    "kernels": kernels_table,
    "quantized": quantized_table,
    "runner": runner_table,
    "training": training_table,
}


def _spread(spread: dict[str, float], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if render(text) == text else "README.md is not made from the result files; run this without --check")
    path.write_text(render(text), encoding="utf-8")
