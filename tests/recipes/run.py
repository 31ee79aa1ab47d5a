"""The recipes, end to end: `python -m tests.recipes.run --data DIR --work DIR [--case news …]`.

Trains with the real command, uploads to a real server that already serves others, measures the test splits there,
compares a mixed batch with PEFT, and writes the figures of what it ran into the result file. What is trained in the
work folder already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.bench.measure import describe_machine
from server.pb.multilora.v1 import inference_pb2
from tests.gguf_files import dequantised
from tests.recipes import figures
from tests.recipes.bases import BASES, TITLES
from tests.recipes.cases import CASES, PROMPT, Case, Test
from tests.recipes.commands import train
from tests.recipes.live import Live
from tests.recipes.mixed import Mixed, make_others, make_untuned_reader
from tests.recipes.rows import Row, read_rows

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "training.json"
UNTUNED = "untuned-reader"
MIXED_ROWS = {"minilm": 48, "gpt2": 48, "smollm2": 6}


def run_base(
    base: str, data: Path, work: Path, threads: int = 2, names: Sequence[str] = tuple(CASES)
) -> dict[str, Any]:
    """The cases of one base (those of `names`), and what their server answered in a mixed batch."""
    work.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES.values() if case.base == base and case.name in names]
    folder = BASES[base](work)
    found = {case.name: _trained(case, folder, data, work) for case in cases}
    plain = folder if base != "smollm2" else _dequantised(folder, work)
    served = work / f"served-{base}"
    shutil.rmtree(served, ignore_errors=True)  # of an earlier run: its versions would be asked, not those of this one
    root = served / "adapters"
    others = make_others(base, plain, root)
    if base == "minilm":
        make_untuned_reader(plain, root / UNTUNED)
    with Live(folder, root, threads) as live:
        for case in cases:
            published = [live.publish(step.out, work / step.out) for step in case.steps]
            found[case.name] |= {
                "publish": published,
                "tests": [_tested(case, test, live, data, plain, work) for test in case.tests],
            }
        mixed = _mixed(base, cases, live, plain, others, data, work)
    for case in cases:
        found[case.name]["served"] = mixed
    return found


def _trained(case: Case, base: Path, data: Path, work: Path) -> dict[str, Any]:
    for part in case.parts:
        part.write(data, work)
    steps = [train(step, {"data": data, "base": base}, work) for step in case.steps]
    return {"kind": case.kind, "base": TITLES[case.base], "steps": steps}


def _dequantised(path: Path, work: Path) -> Path:
    folder = work / "bases" / "smollm2"
    return folder if (folder / "config.json").is_file() else dequantised(path, folder)


def _tested(case: Case, test: Test, live: Live, data: Path, base: Path, work: Path) -> dict[str, Any]:
    rows = read_rows(data / test.split)[: test.count]
    names = [step.out for step in case.steps]
    untuned, before = _untuned(case, live, rows)
    tuned, answers = dict[str, dict[str, float]](), list[str]()
    for name in names:
        tuned[name], answers = _tuned(case, name, live, rows)
    if case.kind == "translate":
        tuned[names[-1]]["perplexity"], untuned["perplexity"] = figures.perplexities(base, work / names[-1], rows)
    return {
        "split": test.split,
        "rows": len(rows),
        "untuned": untuned,
        "tuned": tuned,
        "asked": {"at_least": dict(test.at_least), "margin": dict(test.margin)},
        "examples": figures.examples(rows, before, answers),
    }


def _untuned(case: Case, live: Live, rows: Sequence[Row]) -> tuple[dict[str, float], list[str]]:
    if case.kind == "answer":
        found = live.answers(UNTUNED, rows)
        return figures.answered(found, rows), found
    if case.kind == "translate":
        texts = live.continuations([PROMPT.format(text=row.text) for row in rows], _sampling())
        found = [text.strip() for text in texts]
        return figures.translated(found, rows), found
    return figures.constant(rows), [""] * len(rows)


def _tuned(case: Case, name: str, live: Live, rows: Sequence[Row]) -> tuple[dict[str, float], list[str]]:
    if case.kind == "answer":
        found = live.answers(name, rows)
        return figures.answered(found, rows), found
    if case.kind == "translate":
        found = [text.strip() for text in live.translations(name, rows, _sampling())]
        return figures.translated(found, rows), found
    found = live.labels(name, rows)
    return figures.classified(found, rows), found


def _sampling() -> inference_pb2.SamplingParams:
    """Greedy, up to a line's end: the base alone knows no other end of a translation."""
    return inference_pb2.SamplingParams(temperature=0, max_new_tokens=40, stop=["\n"])


def _mixed(
    base: str, cases: Sequence[Case], live: Live, plain: Path, others: Mapping[str, Path], data: Path, work: Path
) -> dict[str, Any]:
    """Every adapter of ours and all the others at once."""
    count = MIXED_ROWS[base]
    mixed = Mixed(live, plain)
    for case in cases:
        rows = read_rows(data / case.tests[-1].split)[:count]
        last = case.steps[-1].out
        if case.kind == "translate":
            mixed.generate({last: work / last, **others}, last, rows)
        elif case.kind == "answer":
            for step in case.steps:
                mixed.answer(step.out, work / step.out, rows)
        else:
            mixed.classify(last, work / last, 4, rows)
            for name, folder in others.items():
                mixed.classify(name, folder, 4, rows)
    return {**mixed.compare(), "others": len(others)}


def missed(found: Mapping[str, Any]) -> list[str]:
    """What was asked of a case's figures and is not so."""
    problems: list[str] = []
    for test in found["tests"]:
        tuned = list(test["tuned"].values())[-1]
        for metric, limit in test["asked"]["at_least"].items():
            if tuned[metric] < limit:
                problems.append(f"{test['split']}: {metric} {tuned[metric]:.3f}, asked for {limit}")
        for metric, margin in test["asked"]["margin"].items():
            if tuned[metric] < test["untuned"][metric] + margin:
                problems.append(f"{test['split']}: {metric} {tuned[metric]:.3f}, untuned {test['untuned'][metric]:.3f}")
    return problems


def write(found: Mapping[str, Any], out: Path) -> None:
    """Put the cases of `found` into the result file, beside those that it has."""
    before = json.loads(out.read_text(encoding="utf-8"))["cases"] if out.is_file() else {}
    cases = {**before, **{name: {**case, "machine": describe_machine()} for name, case in found.items()}}
    result = {"benchmark": "training", "cases": {name: cases[name] for name in CASES if name in cases}}
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MULTILORA_DATA"), help="or MULTILORA_DATA")
    parser.add_argument("--work", type=Path, required=True, help="where adapters are written")
    parser.add_argument("--case", choices=list(CASES), action="append", help="this one alone; may be repeated")
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.data is None:
        parser.error("needs --data, or MULTILORA_DATA")
    failed = False
    names = given.case or list(CASES)
    for base in dict.fromkeys(CASES[name].base for name in names):
        found = run_base(base, Path(given.data).resolve(), given.work.resolve(), given.threads, names)
        write(found, given.out)
        for name, case in found.items():
            for problem in missed(case):
                failed = True
                print(f"{name}: {problem}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
