"""The real commands, each in a process of its own, and what a run of `multilora train` took."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 3600.0  # a command that hangs
LIMIT_CPU_S = 2 * 1200.0  # of the commands of a case: 20 minutes of 2 cores


class CommandFailed(Exception):
    """A command ended with another status than 0; the message holds what it said last."""


@dataclass(frozen=True)
class Step:
    """One command of a recipe. `arguments` name folders as {data}, {base} and {work}: no path of a machine."""

    arguments: tuple[str, ...]
    out: str  # of `train`: the adapter's folder under {work}

    def shown(self) -> str:
        """As a user would type it."""
        words = ["multilora", *self.arguments]
        return " ".join(f"'{word}'" if any(sign in word for sign in " \n\\") else word for word in words)

    def filled(self, places: Mapping[str, Path | str]) -> list[str]:
        return [word.format_map(_Kept(places)) for word in self.arguments]


class _Kept(dict[str, Any]):
    """Braces of other names stay: they are a prompt template's."""

    def __missing__(self, name: str) -> str:
        return "{" + name + "}"


def run_cli(arguments: Sequence[str], timeout_s: float = LIMIT_S) -> str:
    """What `multilora ARGUMENTS` prints; raises CommandFailed."""
    command = [sys.executable, "-m", "server.cli", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    if done.returncode:
        raise CommandFailed(f"multilora {arguments[0]}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def train(step: Step, places: Mapping[str, Path | str], work: Path) -> dict[str, Any]:
    """Run `multilora train …` unless `work` has its record; the command, seconds, and the validation metrics."""
    record = work / f"{step.out}.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    said = run_cli(step.filled({**places, "work": work}))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    metadata = json.loads((work / step.out / "multilora.json").read_text(encoding="utf-8"))
    found = {
        "command": step.shown(),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(cpu, 1),
        "load_average": round(os.getloadavg()[1], 1),  # of the last 5 minutes: who else had the cores
        "validation": metadata["metrics"],
        "plan": said.strip().splitlines()[:4],
    }
    record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found
