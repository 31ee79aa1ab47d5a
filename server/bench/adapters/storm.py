"""Clients of resident adapters while others are loaded and unloaded without pause."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import grpc

from server.bench.adapters.clients import Calls, Client, connect, in_flight
from server.bench.adapters.figures import at_most, percentile, spread
from server.bench.adapters.folders import name_of
from server.bench.adapters.plan import Scale
from server.bench.adapters.reference import Question, Reference
from server.bench.adapters.servers import BenchServer
from server.bench.measure import OutputsDiffer

_LEAST_SHARE = 0.8  # of the loads that were due; with less there was no storm


def measure_storm(
    scale: Scale, reference: Reference, server: BenchServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    """p99 of the clients in quiet windows and in windows with a storm, in turn."""
    return asyncio.run(_measure(scale, reference, server, progress))


async def _measure(
    scale: Scale, reference: Reference, server: BenchServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    quiet: list[Calls] = []
    stormy: list[Calls] = []
    storm = _Storm(scale)
    async with connect(server.target) as client, connect(server.target) as loading:
        for number in range(scale.storm_resident):
            await client.load(name_of(number))
        await _window(client, reference, scale)  # uncounted
        for turn in range(scale.storm_pairs):
            progress(f"storm {turn + 1} of {scale.storm_pairs}")
            quiet.append(await _window(client, reference, scale))
            blowing = asyncio.create_task(storm.blow(loading))
            stormy.append(await _window(client, reference, scale))
            await blowing
    due = scale.storm_pairs * scale.window_s * scale.loads_per_s
    if len(storm.load_seconds) < _LEAST_SHARE * due:
        raise OutputsDiffer(f"{len(storm.load_seconds)} loads were done, {due:.0f} were due: there was no storm")
    return _result(quiet, stormy, storm)


def _result(quiet: list[Calls], stormy: list[Calls], storm: _Storm) -> dict[str, Any]:
    p99 = {name: [percentile(calls.seconds, 99) for calls in found] for name, found in _named(quiet, stormy)}
    p50 = {name: [percentile(calls.seconds, 50) for calls in found] for name, found in _named(quiet, stormy)}
    ratios = [b / a for a, b in zip(p99["quiet"], p99["storm"], strict=True)]
    failed = sum(sum(calls.failures.values()) for calls in (*quiet, *stormy)) + sum(storm.failures.values())
    return {
        "p99_seconds": {name: spread(values) for name, values in p99.items()},
        "p50_seconds": {name: spread(values) for name, values in p50.items()},
        "calls": {name: [len(calls.seconds) for calls in found] for name, found in _named(quiet, stormy)},
        "ratio_p99": spread(ratios),
        "ratio_calls": spread([len(b.seconds) / len(a.seconds) for a, b in zip(quiet, stormy, strict=True)]),
        "loads": len(storm.load_seconds),
        "load_seconds": spread(storm.load_seconds),
        "failed": failed,
        "failures": [calls.failures for calls in (*quiet, *stormy)] + [storm.failures],
        "targets": {
            "p99 in the storm ÷ p99 before it": at_most(spread(ratios)["median"], 1.2),
            "failed calls": at_most(failed, 0),
        },
    }


def _named(quiet: list[Calls], stormy: list[Calls]) -> tuple[tuple[str, list[Calls]], ...]:
    return ("quiet", quiet), ("storm", stormy)


async def _window(client: Client, reference: Reference, scale: Scale) -> Calls:
    files, texts = len(reference.logits), len(reference.texts)
    questions = (
        Question.of(i % scale.storm_resident, files, i // scale.storm_resident % texts) for i in itertools.count()
    )
    until = time.monotonic() + scale.window_s
    return await in_flight(client, reference, questions, scale.storm_clients, lambda: time.monotonic() < until)


class _Storm:
    """LoadAdapter at a fixed rate, whether those before are done or not; each adapter is unloaded again."""

    def __init__(self, scale: Scale) -> None:
        self.load_seconds: list[float] = []
        self.failures: dict[str, int] = {}
        self._scale = scale
        first = scale.storm_resident
        self._names = itertools.cycle([name_of(n) for n in range(first, first + scale.storm_others)])

    async def blow(self, client: Client) -> None:
        """For one window."""
        started = time.monotonic()
        loads: list[asyncio.Task[None]] = []
        for turn in range(int(self._scale.window_s * self._scale.loads_per_s)):
            await asyncio.sleep(max(0.0, started + turn / self._scale.loads_per_s - time.monotonic()))
            loads.append(asyncio.create_task(self._load(client, next(self._names))))
        await asyncio.gather(*loads)

    async def _load(self, client: Client, name: str) -> None:
        started = time.perf_counter()
        try:
            await client.load(name)
            self.load_seconds.append(time.perf_counter() - started)
            await client.unload(name)
        except grpc.RpcError as error:
            code = error.code().name
            self.failures[code] = self.failures.get(code, 0) + 1
