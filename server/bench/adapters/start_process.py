"""A start in a process of its own: `python -m server.bench.adapters.start_process BASE ROOT` prints what it took."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from lora_runtime.adapters.sources.fetch import Fetcher
from server.backend import Backend, BackendSlot
from server.control.events import EventLog, EventObserver
from server.control.setup import Control
from server.metrics import ServerMetrics
from server.metrics.engine_metrics import EngineMetrics
from server.settings import ServeSettings
from server.startup import load_runtime


def measure(base: str, root: str) -> dict[str, Any]:
    """What App.load does, the base's load taken out of the time and out of the bytes read."""
    settings = ServeSettings.model_validate({"base": base, "adapters": root, "auth": "none"})
    base_seconds, base_bytes = 0.0, 0

    def factory(given: ServeSettings, fetcher: Fetcher) -> Backend:
        nonlocal base_seconds, base_bytes
        before, started = _bytes_read(), time.perf_counter()
        backend = load_runtime(given, fetcher)
        base_seconds, base_bytes = time.perf_counter() - started, _bytes_read() - before
        return backend

    before, started = _bytes_read(), time.perf_counter()
    control = Control(settings, BackendSlot())
    prepared = control.prepare(factory, (EngineMetrics(ServerMetrics()), EventObserver(EventLog())))
    seconds, num_bytes = time.perf_counter() - started - base_seconds, _bytes_read() - before - base_bytes
    infos = prepared.backend.engine.catalogue.all()
    prepared.backend.close(0.0)
    control.close()
    examined = sum(info.is_read for info in infos)
    return {
        "seconds": seconds,
        "base_seconds": base_seconds,
        "bytes_read": num_bytes,
        "listed": len(infos),
        "examined": examined,
    }


def _bytes_read() -> int:
    """By this process so far, cached or not (Linux), else 0."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return 0
    return int(counters.read_text(encoding="utf-8").splitlines()[0].split()[1])


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    print(json.dumps(measure(*sys.argv[1:])))
