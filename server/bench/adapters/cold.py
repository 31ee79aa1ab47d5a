"""The first answer of an adapter that is not in memory, against what nothing can spare: its bytes and one forward."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from server.bench.adapters.clients import Client, connect
from server.bench.adapters.figures import at_most, spread
from server.bench.adapters.folders import WEIGHTS_FILE, name_of
from server.bench.adapters.plan import Scale
from server.bench.adapters.reference import Question, Reference
from server.bench.adapters.servers import BenchServer

_WARM_CALLS = 5
_REST_S = 0.02


def measure_cold(
    scale: Scale, reference: Reference, server: BenchServer, root: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Adapter by adapter: cold for the first time, warm, cold once more, and its bytes read and copied alone."""
    return asyncio.run(_measure(scale, reference, server, root, progress))


async def _measure(
    scale: Scale, reference: Reference, server: BenchServer, root: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    first = scale.storm_resident + scale.storm_others  # none of these was ever loaded
    async with connect(server.target) as client:
        for turn in range(scale.cold + 1):
            progress(f"cold adapter {turn} of {scale.cold}")
            number = first + turn
            question = Question.of(number, len(reference.logits), turn % len(reference.texts))
            seconds = await _one(client, reference, question, root / name_of(number) / WEIGHTS_FILE)
            if turn:  # the first is for everything else that is still cold
                for name, value in seconds.items():
                    found.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        "cold": medians["cold"] / (medians["bytes"] + medians["warm"]),
        "cold_again": medians["cold_again"] / (medians["bytes"] + medians["warm"]),
        "in_server": medians["cold_server"] / (medians["bytes"] + medians["warm_forward"]),
    }
    return {
        "seconds": {name: spread(values) for name, values in found.items()},
        "ratio_of_medians": ratios,
        "targets": {
            "cold answer ÷ (bytes + one warm answer)": at_most(ratios["cold"], 2.0),
            "the same within the server, without RPC": at_most(ratios["in_server"], 2.0),
        },
    }


async def _one(client: Client, reference: Reference, question: Question, weights: Path) -> dict[str, float]:
    alone_s = _read_and_copy(weights)
    await asyncio.sleep(_REST_S)
    reply, cold_s = await client.ask(reference, question)
    timings = reply.timings
    warm: list[float] = []
    forward: list[float] = []
    for _ in range(_WARM_CALLS):
        await asyncio.sleep(_REST_S)
        again, seconds = await client.ask(reference, question)
        warm.append(seconds)
        forward.append(again.timings.forward_seconds)
    await client.unload(question.adapter)
    await asyncio.sleep(_REST_S)
    _, cold_again_s = await client.ask(reference, question)
    await client.unload(question.adapter)
    return {
        "bytes": alone_s,
        "warm": statistics.median(warm),
        "warm_forward": statistics.median(forward),
        "cold": cold_s,
        "cold_again": cold_again_s,
        "cold_server": timings.queue_seconds + timings.load_wait_seconds + timings.forward_seconds,
        "cold_load_wait": timings.load_wait_seconds,
        "cold_forward": timings.forward_seconds,
    }


def _read_and_copy(file: Path) -> float:
    target = np.ones(file.stat().st_size, np.uint8)  # its pages are there, as the arena's may be
    started = time.perf_counter()
    np.copyto(target, np.frombuffer(file.read_bytes(), np.uint8))
    return time.perf_counter() - started
