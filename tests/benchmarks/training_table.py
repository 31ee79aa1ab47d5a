"""The README's table of the recipes: `python -m tests.recipes.run`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.recipes.bases import TITLES
from tests.recipes.cases import CASES, Case

_NUM_EXAMPLES = 3  # of each case
_WIDTH = 90  # characters of an example's cell
_PERCENT = {"accuracy": "accuracy", "exact_match": "exact match", "f1": "F1"}
_NUMBER = {"bleu": "BLEU", "chrf": "chrF", "perplexity": "perplexity"}


def training_table(name: str, result: dict[str, Any]) -> str:
    """Figures on test splits beside those of the untuned base, what training took, and a few answers."""
    cases = result["cases"]
    lines = ["| adapter | base | test split | untuned base | trained | asked for |", "|---|---|---|---|---|---|"]
    lines += [line for case in cases.values() for line in _figures(case)]
    lines += [f"| `{case.name}` | {TITLES[case.base]} | not measured yet | | | |" for case in _missing(cases)]
    if examples := [line for adapter, case in cases.items() for line in _examples(adapter, case)]:
        lines += ["", "| adapter | given | right | untuned base | trained |", "|---|---|---|---|---|", *examples]
    lines += ["", _training(cases), "", _served(cases), "", _footnote(name, cases), ""]
    return "\n".join(lines)


def _missing(cases: dict[str, Any]) -> list[Case]:
    return [case for name, case in CASES.items() if name not in cases]


def _figures(case: dict[str, Any]) -> Iterator[str]:
    for test in case["tests"]:
        untuned = _shown(test["untuned"])
        for adapter, metrics in test["tuned"].items():
            last = adapter == list(test["tuned"])[-1]
            cells = f"`{test['split']}`, {test['rows']:,} rows | {untuned} | {_shown(metrics)}"
            yield f"| `{adapter}` | {case['base']} | {cells} | {_asked(test) if last else ''} |"


def _shown(metrics: dict[str, float]) -> str:
    shown = [f"{title} {100 * metrics[key]:.1f} %" for key, title in _PERCENT.items() if key in metrics]
    shown += [f"{title} {metrics[key]:,.1f}" for key, title in _NUMBER.items() if key in metrics]
    return ", ".join(shown)


def _asked(test: dict[str, Any]) -> str:
    """Targets, and which of them was missed."""
    tuned, untuned = list(test["tuned"].values())[-1], test["untuned"]
    parts: list[str] = []
    for key, limit in test["asked"]["at_least"].items():
        parts.append(f"{_one(key, limit, '≥ ')}{'' if tuned[key] >= limit else ', missed'}")
    for key, margin in test["asked"]["margin"].items():
        parts.append(f"{_one(key, margin, '+ ')}{'' if tuned[key] >= untuned[key] + margin else ', missed'}")
    return "; ".join(parts)


def _one(key: str, value: float, sign: str) -> str:
    return f"{_PERCENT[key]} {sign}{100 * value:g} %" if key in _PERCENT else f"{_NUMBER[key]} {sign}{value:g}"


def _examples(adapter: str, case: dict[str, Any]) -> Iterator[str]:
    if case["kind"] == "classify":
        return
    for example in case["tests"][-1]["examples"][:_NUM_EXAMPLES]:
        cells = (_cell(example[key]) for key in ("given", "wanted", "untuned", "tuned"))
        yield f"| `{adapter}` | {' | '.join(cells)} |"


def _cell(text: str) -> str:
    plain = " ".join(text.replace("|", "/").replace("<", "‹").replace("`", "'").split())
    return plain if len(plain) <= _WIDTH else plain[:_WIDTH] + "…"


def _training(cases: dict[str, Any]) -> str:
    lines = ["| command | processor seconds | wall seconds, load average |", "|---|---|---|"]
    for case in cases.values():
        for step in case["steps"]:
            took = f"{step['cpu_seconds']:,.0f} | {step['seconds']:,.0f}, {step['load_average']:g}"
            lines.append(f"| `{step['command'].replace('|', chr(92) + '|')}` | {took} |")
    return "\n".join(lines)


def _served(cases: dict[str, Any]) -> str:
    """What each server answered in a mixed batch; cases of one base have the same."""
    parts: list[str] = []
    for served in {_server_of(case): case["served"] for case in cases.values()}.values():
        exact = served["largest_difference"] == 0
        how = "token for token" if exact else f"the largest relative difference {served['largest_difference']:.0e}"
        parts.append(
            f"{served['requests']} requests of {served['adapters']} adapters at once ({served['others']} of them "
            f"served before, {served['adapters_in_a_batch']} or more in one batch): {how}"
        )
    return (
        "Each was uploaded to a server that already had others, and asked there; the figures are of its answers. "
        f"Beside PEFT, one adapter and one text at a time: {'; '.join(parts)}."
    )


def _server_of(case: dict[str, Any]) -> str:
    return str(case["base"])


def _footnote(name: str, cases: dict[str, Any]) -> str:
    machine = list(cases.values())[-1]["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return (
        "The untuned base of a classifier is its commonest label, that of a reader has a fresh head, a decoder reads "
        f"the same prompt. Perplexity is per token of the right translation. fp32, {machine['cores']} cores of "
        f"{machine['processor']}, where other work ran at the same time; {versions}. Made by `python -m "
        f"tests.recipes.run --data DIR --work DIR`, examples are the first rows of their split, figures are in "
        f"`tests/benchmarks/results/{name}.json`."
    )
