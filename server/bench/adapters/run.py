"""One run: folders, references, servers, the parts, one result."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from server.bench.adapters.cold import measure_cold
from server.bench.adapters.folders import Weights
from server.bench.adapters.many import measure_many
from server.bench.adapters.memory import measure_memory, write_shapes
from server.bench.adapters.plan import RANK, TARGETS, TOLERANCE, AdaptersBench
from server.bench.adapters.reference import Reference
from server.bench.adapters.replace import measure_replace, write_versions
from server.bench.adapters.servers import BenchServer
from server.bench.adapters.storm import measure_storm
from server.bench.measure import describe_machine
from server.bench.texts import sample_texts
from server.collector import exempt_meanwhile

_Progress = Callable[[str], None]


def run_adapters_bench(bench: AdaptersBench, progress: _Progress) -> dict[str, Any]:
    """Measure the parts asked for; raises OutputsDiffer when an answer was wrong or a part did not do its work."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        progress(f"making {bench.scale.num_weights} adapters")
        weights = Weights.make(bench.base, folder / "weights", bench.scale.num_weights)
        progress("asking PEFT for the reference")
        reference = Reference.compute(bench.base, weights.files, sample_texts(bench.scale.num_texts))
        found: dict[str, Any] = {}
        with exempt_meanwhile():
            if "many" in bench.parts:
                found["many"] = measure_many(bench, weights, reference, folder, progress)
            if set(bench.parts) - {"many"}:
                found |= _measure_moving(bench, weights, reference, folder, progress)
    settings = {name: value for name, value in asdict(bench).items() if name not in ("base", "parts")}
    return {
        "benchmark": "adapters",
        "base": Path(bench.base).parent.name if Path(bench.base).is_dir() else bench.base,
        "settings": settings | {"rank": RANK, "targets": TARGETS},
        "machine": describe_machine(),
        "answers_checked": reference.num_checked,
        "largest_error": reference.largest_error,
        "tolerance": TOLERANCE,
        "seconds": time.monotonic() - started,
        "parts": found,
    }


def _measure_moving(
    bench: AdaptersBench, weights: Weights, reference: Reference, folder: Path, progress: _Progress
) -> dict[str, Any]:
    """The parts that share one server."""
    scale = bench.scale
    root = weights.write_root(folder / "moving", range(scale.storm_resident + scale.storm_others + scale.cold + 1))
    write_versions(weights, root)
    write_shapes(bench.base, folder / "shapes", root)
    parts: dict[str, Callable[[BenchServer], dict[str, Any]]] = {
        "cold": lambda server: measure_cold(scale, reference, server, root, progress),
        "storm": lambda server: measure_storm(scale, reference, server, progress),
        "replace": lambda server: measure_replace(scale, reference, server, progress),
        "memory": lambda server: measure_memory(bench, reference, server, root, progress),
    }
    progress("starting a server")
    with BenchServer(bench.base, root, bench.threads) as server:
        return {name: measure(server) for name, measure in parts.items() if name in bench.parts}
