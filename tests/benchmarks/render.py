"""Writes the README's benchmark tables from the committed result files: `python -m tests.benchmarks.render`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
_BLOCK = re.compile(r"(<!-- result (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

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


def render(readme: str) -> str:
    """The README's text with every block between `<!-- result NAME -->` and `<!-- end -->` made anew."""
    return _BLOCK.sub(lambda block: block[1] + _table(block["name"]) + block[3], readme)


def _table(name: str) -> str:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
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


def _spread(spread: dict[str, float], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"


if __name__ == "__main__":
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if render(text) == text else "README.md is not made from the result files; run this without --check")
    path.write_text(render(text), encoding="utf-8")
