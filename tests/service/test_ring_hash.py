"""Two server processes behind a client that hashes the adapter, by the service config of deploy/README.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import make_adapter
from tests.service.fake_runtime import write_adapter
from tests.service.ring_hash_client import ROUNDS

ROOT = Path(__file__).parents[2]
ADAPTERS = [f"adapter-{number}" for number in range(16)]  # both of two servers have some, but once in 32,768 runs
REAL = ("-c", "from server.cli import app; app()", "serve", "--auth", "none", "--port", "0", "--metrics-port", "0")
FAKE = ("-m", "tests.service.fake_server")


def documented_config() -> dict[str, Any]:
    (text,) = re.findall(r"```json\n(\{.*?ring_hash.*?\})\n```", (ROOT / "deploy" / "README.md").read_text(), re.DOTALL)
    return json.loads(text)


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str = field(default="", init=False)
    metrics: str = field(default="", init=False)

    def until_serving(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, _, value = line.strip().partition(" ")
            if name == "gRPC":
                self.address = value.strip()
            if name == "metrics":
                self.metrics = value.strip()
                return
        raise AssertionError("the server ended before it served")

    def answered(self) -> Counter[str]:
        """Requests that it has answered, by adapter; those before it counted an adapter by itself as `other`."""
        with urllib.request.urlopen(self.metrics, timeout=10) as reply:
            text = reply.read().decode()
        pattern = r'^multilora_adapter_requests_total\{adapter="([^"]+)",outcome="ok",.*\} (\S+)$'
        return Counter({name: int(float(value)) for name, value in re.findall(pattern, text, re.MULTILINE)})


@contextmanager
def started(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def two_servers(*arguments: str) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        servers = [Server(stack.enter_context(started(*arguments))) for _ in range(2)]
        for server in servers:
            server.until_serving()
        yield servers


def client_of(servers: list[Server], config: dict[str, Any]) -> Any:
    """What a name that resolves to both would give the client."""
    target = "ipv4:" + ",".join(server.address for server in servers)
    variables = {"GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY": "1"}
    return started("-m", "tests.service.ring_hash_client", target, json.dumps(config), *ADAPTERS, **variables)


def say(client: subprocess.Popen[str]) -> None:
    assert client.stdin is not None
    client.stdin.write("\n")
    client.stdin.flush()


def hear(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    return client.stdout.readline().strip()


def load_and_kill(client: subprocess.Popen[str], victim: Server, survivor: Server) -> dict[str, Any]:
    """How calls ended that were in flight all the time, before and after a kill."""
    before = [server.answered().total() for server in (victim, survivor)]
    say(client)
    until(lambda: all(s.answered().total() > n + 100 for s, n in zip((victim, survivor), before, strict=True)))
    moved = victim.answered().keys() - {"other"}
    victim.process.kill()
    until(lambda: all(survivor.answered()[adapter] > 10 for adapter in moved))
    say(client)
    return json.loads(hear(client))


def until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def check(servers: list[Server]) -> None:
    with client_of(servers, documented_config()) as client:
        assert hear(client) == "asked"
        homes = [server.answered().keys() - {"other"} for server in servers]
        assert all(homes), "all adapters went to one server"
        assert homes[0] | homes[1] == set(ADAPTERS)
        assert not homes[0] & homes[1], "an adapter reached both servers"
        assert [server.answered().total() for server in servers] == [2 * ROUNDS * len(home) for home in homes]
        outcomes = load_and_kill(client, *servers)
    plain, retrying = outcomes["plain"], outcomes["retrying"]
    assert plain["failed"], "no call was in flight at the kill"
    assert set(plain["failed"]) <= homes[0], "calls of the server that lived failed"
    assert all(codes == ["UNAVAILABLE"] for codes in plain["failed"].values()), "more failed than was in flight"
    assert plain["num_failed_again"] == 0
    assert not retrying["failed"], "the service config makes no retry"
    assert set(plain["answered"]) == set(retrying["answered"]) == set(ADAPTERS)


def test_an_adapter_has_a_home_and_a_kill_costs_only_the_calls_in_flight(tmp_path: Path) -> None:
    for name in ADAPTERS:
        write_adapter(tmp_path / name, labels=["no", "yes"])
    with two_servers(*FAKE, str(tmp_path)) as servers:
        check(servers)


@pytest.mark.slow
def test_the_command_and_real_adapters_behave_the_same(tmp_path: Path, tiny_bert: Path) -> None:
    first = make_adapter(tiny_bert, tmp_path / ADAPTERS[0])
    for name in ADAPTERS[1:]:
        shutil.copytree(first, tmp_path / name)
    with two_servers(*REAL, "--base", str(tiny_bert), "--adapters", str(tmp_path), "--threads", "1") as servers:
        check(servers)
