"""One run: tenants, keys, references, the parts, one result."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from server.bench.adapters.folders import Weights
from server.bench.adapters.plan import RANK, TARGETS, TOLERANCE
from server.bench.adapters.reference import Reference
from server.bench.measure import OutputsDiffer, describe_machine
from server.bench.tenants.cancels import measure_cancels
from server.bench.tenants.noisy import measure_noisy
from server.bench.tenants.overload import measure_overload
from server.bench.tenants.plan import TENANTS, TenantsBench
from server.bench.tenants.servers import TenantServer
from server.bench.tenants.shares import measure_shares
from server.bench.tenants.site import Site
from server.bench.texts import sample_texts
from server.collector import exempt_meanwhile

_MEASURES = {
    "noisy": measure_noisy,
    "shares": measure_shares,
    "overload": measure_overload,
    "cancels": measure_cancels,
}


def run_tenants_bench(bench: TenantsBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure the parts asked for; raises OutputsDiffer when an answer was wrong or a part did not do its work."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # for the reference; the processor may be busy with others
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        progress(f"making {len(TENANTS)} adapters")
        weights = Weights.make(bench.base, folder / "weights", len(TENANTS))
        site = Site.make(folder, weights)
        progress("asking PEFT for the reference")
        reference = Reference.compute(bench.base, weights.files, sample_texts(bench.scale.num_texts))
        progress("starting a server")
        with TenantServer(bench.base, site, bench.threads, "default") as server, exempt_meanwhile():
            found = {
                part: _measure(part, bench, site, reference, server, progress)
                for part in _MEASURES
                if part in bench.parts
            }
    settings = {name: value for name, value in asdict(bench).items() if name not in ("base", "parts")}
    return {
        "benchmark": "tenants",
        "base": Path(bench.base).parent.name if Path(bench.base).is_dir() else bench.base,
        "settings": settings | {"rank": RANK, "targets": TARGETS},
        "machine": describe_machine(),
        "answers_checked": reference.num_checked,
        "largest_error": reference.largest_error,
        "tolerance": TOLERANCE,
        "seconds": time.monotonic() - started,
        "parts": found,
    }


def _measure(
    part: str,
    bench: TenantsBench,
    site: Site,
    reference: Reference,
    server: TenantServer,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    try:
        return _MEASURES[part](bench, site, reference, server, progress)
    except BaseExceptionGroup as group:  # of clients; the first wrong answer is what people need
        wrong = group.subgroup(OutputsDiffer)
        while isinstance(wrong, BaseExceptionGroup):
            wrong = wrong.exceptions[0]
        raise wrong or group from group
