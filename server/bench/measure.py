"""Interleaved timing: all contenders take turns in every round, so a drift of the machine meets them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("multilora", "torch", "transformers", "peft", "numpy", "grpcio")


class OutputsDiffer(Exception):
    """A contender's outputs are not the reference's; no speed is reported."""


class ContenderFailed(Exception):
    """Another project that was to be measured does not run here."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, on_round: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one uncounted turn each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
        on_round(turn)
    return seconds


def ratio(seconds: Mapping[str, list[float]], fast: str, slow: str) -> Spread:
    """Throughput of `fast` over throughput of `slow`, round by round."""
    return Spread.of([b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)])


def largest_difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of equal shapes."""
    return max(float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True))


def describe_machine() -> dict[str, object]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
