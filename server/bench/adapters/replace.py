"""An alias moves between two versions while clients ask by it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from server.bench.adapters.clients import CALL_TIMEOUT_S, Client, connect
from server.bench.adapters.figures import at_least, at_most, spread
from server.bench.adapters.folders import Weights
from server.bench.adapters.plan import TOLERANCE, Scale
from server.bench.adapters.reference import Question, Reference
from server.bench.adapters.servers import BenchServer
from server.pb.multilora.v1 import adapters_pb2, inference_pb2

NAME, ALIAS = "replaced", "prod"
VERSIONS = (1, 2)  # version v has the weights of file v - 1


def write_versions(weights: Weights, root: Path) -> None:
    for version in VERSIONS:
        weights.template.write_folder(root / NAME / str(version), weights.files[version - 1])


def measure_replace(
    scale: Scale, reference: Reference, server: BenchServer, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Who answered which call; every move loads the version that it leads to."""
    return asyncio.run(Replacing(scale, reference).measure(server, progress))


class Replacing:
    """The clients, the moves, and who answered what."""

    def __init__(self, scale: Scale, reference: Reference) -> None:
        self._scale = scale
        self._reference = reference
        self._begun: list[int] = []  # versions of the moves that have begun, in order
        self._num_done = 0
        self.counts: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._stopped = False

    async def measure(self, server: BenchServer, progress: Callable[[str], None]) -> dict[str, Any]:
        move_seconds: list[float] = []
        async with connect(server.target) as client, connect(server.target) as moving:
            await self._move(moving, VERSIONS[0])
            clients = [asyncio.create_task(self._ask_on(client, first)) for first in range(self._scale.replace_clients)]
            for turn in range(self._scale.moves):
                progress(f"move {turn + 1} of {self._scale.moves}")
                await asyncio.sleep(self._scale.move_interval_s)
                version = VERSIONS[(turn + 1) % 2]
                await moving.unload(f"{NAME}@{version}")
                move_seconds.append(await self._move(moving, version))
            await asyncio.sleep(self._scale.move_interval_s)
            self._stopped = True
            await asyncio.gather(*clients)
        counts = {name: self.counts[name] for name in ("answered", "one_version_allowed", "old", "neither", "failed")}
        by_version = {str(version): self.counts[f"version {version}"] for version in VERSIONS}
        return {
            "moves": len(move_seconds),
            "move_seconds": spread(move_seconds),
            "counts": counts | {"by_version": by_version},
            "call_seconds": spread(sorted(self._latencies)[:: max(1, len(self._latencies) // 100)]),
            "targets": {
                "answers of neither version": at_most(counts["neither"], 0),
                "old answers after a move": at_most(counts["old"], 0),
                "failed calls": at_most(counts["failed"], 0),
                "calls that one version alone may answer": at_least(counts["one_version_allowed"], 1),
                "calls of the version answered less": at_least(min(by_version.values()), 1),
            },
        }

    async def _move(self, client: Client, version: int) -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        self._begun.append(version)
        await client.adapters.SetAlias(
            adapters_pb2.SetAliasRequest(adapter=NAME, alias=ALIAS, version=version), timeout=CALL_TIMEOUT_S
        )
        self._num_done += 1
        return loop.time() - started

    async def _ask_on(self, client: Client, first: int) -> None:
        texts = len(self._reference.texts)
        loop = asyncio.get_running_loop()
        for turn in itertools.count(first):
            if self._stopped:
                return
            question = Question(f"{NAME}@{ALIAS}", 0, turn % texts)
            last_done, started = self._num_done, loop.time()
            try:
                reply = await client.inference.Classify(self._reference.request(question), timeout=CALL_TIMEOUT_S)
            except grpc.RpcError:
                self.counts["failed"] += 1
                continue
            self._latencies.append(loop.time() - started)
            # what the alias led to when the call began, and everything it was led to until the reply
            self.count(reply, question.text, {*self._begun[last_done - 1 :]})

    def count(self, reply: inference_pb2.ClassifyResponse, text: int, allowed: set[int]) -> None:
        """Count one reply; `allowed` are the versions that may have answered it."""
        self.counts["answered"] += 1
        self.counts["one_version_allowed"] += len(allowed) == 1
        matching = [v for v in VERSIONS if self._reference.error(v - 1, text, reply) <= TOLERANCE]
        if matching != [reply.version]:
            self.counts["neither"] += 1
            return
        self.counts[f"version {reply.version}"] += 1
        self.counts["old"] += reply.version not in allowed
