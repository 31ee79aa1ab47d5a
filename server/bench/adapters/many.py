"""Ten thousand adapters registered and a thousand in memory, against a server with ten.

Both servers run side by side, one of them held still while the other is measured, in turn. What the mixture of adapters
in a batch costs by itself is shown by a third contender: the large server, asked for as few adapters as the small one.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.bench.adapters.clients import Client, connect, in_flight
from server.bench.adapters.figures import at_least, at_most, percentile, spread
from server.bench.adapters.folders import Weights, name_of
from server.bench.adapters.plan import AdaptersBench, Scale
from server.bench.adapters.reference import Question, Reference
from server.bench.adapters.servers import BenchServer
from server.bench.measure import OutputsDiffer
from server.pb.multilora.v1 import adapters_pb2, common_pb2

_EXAMINED_WITHIN_S = 300.0


def measure_many(
    bench: AdaptersBench, weights: Weights, reference: Reference, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Throughput, listing and start-up with many adapters."""
    scale = bench.scale
    progress(f"writing {scale.registered} adapter folders")
    many_root = weights.write_root(folder / "many", range(scale.registered))
    few_root = weights.write_root(folder / "few", range(scale.few))
    progress(f"starting with {scale.registered} folders")
    start = _measure_start(bench, weights, many_root)
    few, many = (BenchServer(bench.base, root, bench.threads) for root in (few_root, many_root))
    with few, many:
        found = asyncio.run(_measure_servers(scale, reference, few, many, progress))
    ratios = found["texts_per_second"]
    pairs = zip(ratios["many"]["raw"], ratios["few"]["raw"], strict=True)
    same = zip(ratios["many_asked_for_few"]["raw"], ratios["few"]["raw"], strict=True)
    share = spread([a / b for a, b in pairs])
    return found | {
        "ratio": share,
        "ratio_same_requests": spread([a / b for a, b in same]),
        "start": start,
        "targets": {
            "throughput, many ÷ few": at_least(share["median"], 0.95),
            "ListAdapters, page of 100, seconds": at_most(found["list_seconds"]["100"]["median"], 0.05),
            "ListAdapters, page of 1000, seconds": at_most(found["list_seconds"]["1000"]["median"], 0.05),
            "start-up without the base's load, seconds": at_most(start["seconds"]["median"], 10.0),
            "bytes read at start ÷ bytes of weights": at_most(start["read_share"], 0.05),
        },
    }


async def _measure_servers(
    scale: Scale, reference: Reference, few: BenchServer, many: BenchServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    async with connect(few.target) as few_client, connect(many.target) as many_client:
        progress("waiting until every folder is examined")
        examined_s = await _until_examined(many_client, scale.registered)
        progress("measuring ListAdapters")
        list_seconds = await _measure_lists(many_client, scale)
        progress(f"loading {scale.resident} adapters")
        for number in range(scale.few):
            await few_client.load(name_of(number))
        load_seconds = [(await many_client.load(name_of(number))).load_seconds for number in range(scale.resident)]
        if (ready := await _count_ready(many_client)) != scale.resident:
            raise OutputsDiffer(f"{ready} adapters are in memory, not {scale.resident}")
        rates = await _measure_rounds(scale, reference, (few, few_client), (many, many_client), progress)
        if (ready := await _count_ready(many_client)) != scale.resident:
            raise OutputsDiffer(f"{ready} adapters are in memory at the end, not {scale.resident}")
    return {
        "texts_per_second": rates,
        "list_seconds": list_seconds,
        "examined_within_seconds": examined_s,
        "load_seconds": spread(load_seconds),
        "arena_bytes": many.arena_used_bytes,
        "rss_bytes": {"few": few.rss_bytes(), "many": many.rss_bytes()},
    }


async def _until_examined(client: Client, wanted: int) -> float:
    """Seconds after serving began until every adapter's task is known."""
    started = time.monotonic()
    while len(await client.list_all(task=common_pb2.TASK_CLASSIFY)) < wanted:
        if time.monotonic() - started > _EXAMINED_WITHIN_S:
            raise OutputsDiffer(f"not all folders were examined within {_EXAMINED_WITHIN_S:g} s")
        await asyncio.sleep(0.5)
    return time.monotonic() - started


async def _count_ready(client: Client) -> int:
    return len(await client.list_all(state=adapters_pb2.ADAPTER_STATE_READY))


async def _measure_lists(client: Client, scale: Scale) -> dict[str, Any]:
    """Seconds of a page by its size, at places all over the list; all pages together must be the whole list."""
    names = [adapter.name.split("/")[3] for adapter in await client.list_all()]
    if names != [name_of(number) for number in range(scale.registered)]:
        raise OutputsDiffer("the pages of ListAdapters are not the list of adapters")
    found: dict[str, Any] = {}
    for size in (100, 1000):
        seconds: list[float] = []
        token = ""
        for _ in range(scale.list_calls):
            started = time.perf_counter()
            page = await client.adapters.ListAdapters(
                adapters_pb2.ListAdaptersRequest(page_size=size, page_token=token)
            )
            seconds.append(time.perf_counter() - started)
            token = page.next_page_token
        found[str(size)] = spread(seconds) | {"p95": percentile(seconds, 95)}
    return found


async def _measure_rounds(
    scale: Scale,
    reference: Reference,
    few: tuple[BenchServer, Client],
    many: tuple[BenchServer, Client],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    chance = random.Random(0)
    files = len(reference.logits)
    # as many different files of weights as there are, of the adapters in memory
    asked = [i % files + files * chance.randrange(max(1, scale.resident // files)) for i in range(scale.asked)]
    contenders = {
        "few": (*few, many[0], [*range(scale.few)]),
        "many": (*many, few[0], asked),
        "many_asked_for_few": (*many, few[0], [*range(scale.few)]),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(scale.rounds + 1):
        progress(f"round {turn} of {scale.rounds}")
        texts = [chance.randrange(len(reference.texts)) for _ in range(scale.calls_per_turn)]
        for name in sorted(contenders, key=lambda _: chance.random()):
            _, client, other, numbers = contenders[name]
            questions = iter([Question.of(chance.choice(numbers), files, text) for text in texts])
            with other.held_still():
                started = time.perf_counter()
                calls = await in_flight(client, reference, questions, scale.calls_in_flight)
                seconds = time.perf_counter() - started
            if calls.failures:
                raise OutputsDiffer(f"{name}: calls failed: {calls.failures}")
            if turn:
                rates[name].append(len(calls.seconds) / seconds)
    return {name: spread(values) for name, values in rates.items()}


def _measure_start(bench: AdaptersBench, weights: Weights, root: Path) -> dict[str, Any]:
    """In a process each: from the listing of the root to a server that would serve, less the base's load."""
    runs: list[dict[str, Any]] = []
    for _ in range(bench.scale.starts):
        command = [sys.executable, "-m", "server.bench.adapters.start_process", bench.base, str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        if runs[-1]["listed"] != bench.scale.registered:
            raise OutputsDiffer(f"{runs[-1]['listed']} adapters are listed, not {bench.scale.registered}")
    weight_bytes = bench.scale.registered * weights.files[0].stat().st_size
    return {
        "seconds": spread([run["seconds"] for run in runs]),
        "base_seconds": spread([run["base_seconds"] for run in runs]),
        "examined_by_then": spread([run["examined"] for run in runs]),
        "bytes_read": spread([run["bytes_read"] for run in runs]),
        "bytes_of_weights": weight_bytes,
        "read_share": max(run["bytes_read"] for run in runs) / weight_bytes,
    }
