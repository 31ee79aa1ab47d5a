"""Is a new result worse than the committed one? `python -m tests.benchmarks.compare NEW [--against COMMITTED]`.

Ratios are compared, never times: both sides of a ratio were measured in the same run. A ratio has moved when the new
median lies outside the old spread and the old median outside the new one. Any kind of result is understood that has
`ratios` by name, each with median, low and high, and says in `better` whether `lower` or `higher` is (`higher` when
absent, for ratios of throughput). Exit status: 0 nothing is worse by more than the tolerance, 1 something is, 2 the
files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.measure import Spread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "tests/benchmarks/results"
TOLERANCE = 0.10  # relative, of a ratio's median
_MACHINE = ("processor", "cores", "system")  # the same for the same machine; versions may differ, and are shown
_SELECTION = ("rounds", "shapes", "quick", "without")  # settings that choose what is measured, not how


class NotComparable(Exception):
    """The two results say nothing about each other."""


@dataclass(frozen=True, slots=True)
class Move:
    """One ratio, before and now."""

    name: str
    old: Spread
    new: Spread
    lower_is_better: bool

    @property
    def change(self) -> float:
        """Relative, of the median: 0.1 is a tenth more."""
        return self.new.median / self.old.median - 1

    @property
    def beyond_spread(self) -> bool:
        return not (
            self.old.low <= self.new.median <= self.old.high or self.new.low <= self.old.median <= self.new.high
        )

    @property
    def slowdown(self) -> float:
        """How much slower, relative; negative when faster. Half the throughput and twice the time are both 1."""
        factor = self.new.median / self.old.median
        return factor - 1 if self.lower_is_better else 1 / factor - 1


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[Move]:
    """Every ratio that both have; raises NotComparable when the results differ in more than time."""
    check_comparable(new, old)
    lower = new.get("better", "higher") == "lower"
    common = [name for name in new["ratios"] if name in old["ratios"]]
    if not common:
        raise NotComparable("the two results have no ratio in common; measure the same cases")
    return [Move(name, Spread(**old["ratios"][name]), Spread(**new["ratios"][name]), lower) for name in common]


def check_comparable(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Raise NotComparable, with the first reason, unless kind, machine and settings are the same."""
    for result, which in ((new, "new"), (old, "committed")):
        if not isinstance(result.get("ratios"), dict):
            raise NotComparable(f"the {which} result, of kind {result.get('benchmark')!r}, has no ratios to compare")
    for what, (now, before) in _identity(new, old):
        if now != before:
            raise NotComparable(f"{what} differs: {now!r} now, {before!r} in the committed result")


def find_committed(new: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and content of the one result in HEAD that `new` can be compared with."""
    reasons: list[str] = []
    found: list[tuple[str, dict[str, Any]]] = []
    for name, result in committed_results():
        try:
            check_comparable(new, result)
            found.append((name, result))
        except NotComparable as reason:
            reasons.append(f"  {name}: {reason}")
    if not found:
        raise NotComparable("\n".join(["no committed result can be compared with it:", *reasons]))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise NotComparable(f"several committed results fit: {names}; name one with --against")
    return found[0]


def moves_table(moves: Sequence[Move]) -> str:
    """The moved ratios, the worst first."""
    lines = ["| ratio | committed, median (low to high) | new | change | |", "|---|---|---|---|---|"]
    lines += [
        f"| {m.name} | {_text(m.old)} | {_text(m.new)} | {m.change:+.0%} | {'slower' if m.slowdown > 0 else 'faster'} |"
        for m in sorted(moves, key=lambda m: m.slowdown, reverse=True)
    ]
    return "\n".join(lines)


def _identity(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[tuple[str, tuple[object, object]]]:
    """What must be equal, as (description, (new, old))."""
    yield "the kind of benchmark", (new.get("benchmark"), old.get("benchmark"))
    yield "what better means", (new.get("better", "higher"), old.get("better", "higher"))
    machines = new["machine"], old["machine"]
    for key in _MACHINE:
        yield f"the machine's {key}", (machines[0].get(key), machines[1].get(key))
    gpus = tuple(machine.get("accelerator", {}).get("name") for machine in machines)
    yield "the machine's accelerator", (gpus[0], gpus[1])
    yield "the base model", (new.get("base"), old.get("base"))
    for key in sorted({*new["settings"], *old["settings"]} - set(_SELECTION)):
        yield f"the setting {key}", (_plain(new["settings"].get(key)), _plain(old["settings"].get(key)))


def _plain(value: object) -> object:
    """As it reads in a file: a tuple and a list are the same."""
    return json.loads(json.dumps(value))


def committed_results() -> list[tuple[str, dict[str, Any]]]:
    """(file name, content) of every result file in HEAD, whatever the working tree has."""
    names = _git("ls-tree", "--name-only", "HEAD", f"{RESULTS}/").split()
    return [(Path(name).name, json.loads(_git("show", f"HEAD:{name}"))) for name in names if name.endswith(".json")]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotComparable(f"git {arguments[0]} failed: {done.stderr.strip()}; name a file with --against")
    return done.stdout


def _changed_versions(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    before, now = old["machine"]["versions"], new["machine"]["versions"]
    return [f"{name} {before.get(name)} → {now[name]}" for name in now if now[name] != before.get(name)]


def _text(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotComparable(f"{path} is not a result file: {error}") from error
    if not isinstance(result, dict) or not {"benchmark", "machine", "settings"} <= set(result):
        raise NotComparable(f"{path} is not a result file: it names no benchmark, machine and settings")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare", description=__doc__)
    parser.add_argument("new", type=Path, help="the new result file")
    parser.add_argument("--against", type=Path, help="default: the committed result of the same kind and machine")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        new = _read(options.new)
        name, old = (options.against.name, _read(options.against)) if options.against else find_committed(new)
        moves = compare(new, old)
        gone = len(old["ratios"].keys() - new["ratios"].keys())
    except NotComparable as reason:
        print(reason, file=sys.stderr)
        return 2
    if gone:
        print(f"{gone} ratios of {name} are not in the new result and were not compared")
    return _report(name, moves, _changed_versions(new, old), options.tolerance)


def _report(name: str, moves: Sequence[Move], versions: Sequence[str], tolerance: float) -> int:
    moved = [move for move in moves if move.beyond_spread]
    worse = [move for move in moved if move.slowdown > tolerance]
    if versions:
        print(f"versions differ: {', '.join(versions)}\n")
    if moved:
        print(moves_table(moved) + "\n")
    print(
        f"{len(moves)} ratios compared with {name}: {len(moved)} moved beyond the spread, "
        f"{len(worse)} slower by more than {tolerance:.0%}."
    )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
