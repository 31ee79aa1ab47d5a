"""SIGKILL at any moment: what was acknowledged is there after a restart, and nothing is there by half."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from server.pb.multilora.v1 import adapters_pb2_grpc, inference_pb2_grpc
from tests.chaos.control_client import CONTENTS, ControlClient, files_of
from tests.oracle import make_adapter
from tests.service.harness import classify_request

NUM_KILLS = 4
NAMES = ("default/news", "default/tickets", "acme/news", "zoo/news")
SEED = 7


@dataclass
class Server:
    """A `multilora serve` in a process of its own, and its clients."""

    process: subprocess.Popen[bytes]
    adapters: Any
    inference: Any


@pytest.fixture
def root(tmp_path: Path, tiny_bert: Path) -> Path:
    for seed, content in enumerate(CONTENTS):
        make_adapter(tiny_bert, tmp_path / "adapters" / content, seed=seed)
    return tmp_path / "adapters"


@asynccontextmanager
async def serving(base: Path, root: Path, state: Path) -> AsyncGenerator[Server]:
    log = (state.parent / "log").open("ab")
    flags = {
        "--auth": "none",
        "--base": base, "--adapters": root, "--state": state, "--port": 0, "--metrics-port": 0, "--threads": 1,
        "--watch-seconds": 0.2, "--arena-mib": 32, "--log-level": "warning",
    }  # fmt: skip
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from server.cli import app; app()", "serve"),
            *(str(part) for flag in flags.items() for part in flag),
        ],
        stdout=subprocess.PIPE,
        stderr=log,
    )
    with log, process:
        try:
            async with aio.insecure_channel(await asyncio.to_thread(address_of, process)) as channel:
                adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
                yield Server(process, adapters, inference_pb2_grpc.InferenceServiceStub(channel))
        finally:
            process.kill()


def address_of(process: subprocess.Popen[bytes]) -> str:
    """Wait until it serves."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:1] == [b"gRPC"]:
            return line.split()[1].decode()
    raise AssertionError(f"the server ended with {process.wait()}; see its log")


async def check(server: Server, clients: list[ControlClient], state: Path) -> None:
    replies = [await server.inference.Classify(classify_request(content, "a text")) for content in CONTENTS]
    digests = {content: reply.digest for content, reply in zip(CONTENTS, replies, strict=True)}
    assert not [*(state / "incoming").glob("*")]
    assert await asyncio.to_thread(are_whole, state, clients)
    await asyncio.gather(*(client.check(server.adapters) for client in clients))
    await asyncio.gather(*(client.check_answers(server.inference, digests) for client in clients))
    stored = await asyncio.to_thread(files_of, state / "adapters") if (state / "adapters").exists() else {}
    assert stored == {path: data for client in clients for path, data in client.stored_files().items()}


def are_whole(state: Path, clients: list[ControlClient]) -> bool:
    """Whether every version on disk has all files of an adapter, as one was sent."""
    sent = [*clients[0].contents.values()]
    return all(files_of(folder) in sent for folder in (state / "adapters").glob("*/*/*"))


@pytest.mark.slow
async def test_what_was_acknowledged_outlives_sigkill(tmp_path: Path, root: Path, tiny_bert: Path) -> None:
    rng, state = random.Random(SEED), tmp_path / "state"
    clients = [ControlClient(name, root, random.Random(f"{SEED} {name}")) for name in NAMES]
    num_in_doubt = 0
    for _ in range(NUM_KILLS):
        async with serving(tiny_bert, root, state) as server:
            await check(server, clients, state)
            storms = [asyncio.create_task(client.storm(server.adapters)) for client in clients]
            await asyncio.sleep(rng.uniform(0.2, 1.2))
            server.process.kill()
            await asyncio.gather(*storms)
            num_in_doubt += sum(client.in_doubt is not None for client in clients)
    async with serving(tiny_bert, root, state) as server:
        await check(server, clients, state)
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, 20) == 0
    assert sum(client.num_acknowledged for client in clients) > 20 * NUM_KILLS, "the storm did not happen"
    assert num_in_doubt > NUM_KILLS, "no kill hit a call"
