"""The metrics port: routers, probes, operators, and what a scrape costs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_runtime.device_memory import DeviceMemory
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import (
    AdapterCard,
    AdapterId,
    AdapterInfo,
    AdapterState,
    ProblemType,
    Request,
    Result,
    RunnerStats,
    Task,
    Timings,
    TokenSequence,
)
from server.metrics import ServerMetrics
from server.metrics.engine_metrics import EngineMetrics
from server.metrics.series import SERIES, Page
from server.pb.multilora.v1 import adapters_pb2
from server.tenancy.model import Role
from tests.service.fake_runtime import RESIDENT_BYTES
from tests.service.harness import Harness, classify_request, failure_of, running
from tests.service.tenants import make_door

CARD = AdapterCard(Task.EMBED, (), ProblemType.SINGLE_LABEL, None, None, None)


async def get(server: Harness, path: str, **headers: str) -> tuple[int, str]:
    """Status and body; `host_` sets the Host header."""
    url = f"http://127.0.0.1:{server.app.metrics_port}{path}"
    given = {name.rstrip("_"): value for name, value in headers.items()}

    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=given), timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


# Probes


async def test_ready_follows_the_servers_life_and_live_does_not(adapter_root: Path) -> None:
    hold = threading.Event()
    async with running(adapter_root, hold_base=hold, drain_delay=0.5) as server:
        assert await get(server, "/livez") == (200, "ok\n")
        assert await get(server, "/readyz") == (503, "the server is starting\n")
        hold.set()
        async with asyncio.timeout(10):
            while (await get(server, "/readyz"))[0] != 200:
                await asyncio.sleep(0.01)
        server.stop.set()
        await asyncio.sleep(0.05)
        assert await get(server, "/readyz") == (503, "the server is draining\n")
        assert await get(server, "/livez") == (200, "ok\n")


async def test_an_engine_whose_loop_stands_still_is_not_live(adapter_root: Path) -> None:
    async with running(adapter_root, stall_seconds=5.0) as server:
        server.engine.turned_at = time.monotonic() - 4
        assert (await get(server, "/livez"))[0] == 200
        server.engine.turned_at = time.monotonic() - 6
        for path in ("/livez", "/readyz"):
            assert await get(server, path) == (503, "the engine's loop has not turned for 6 s\n")
        turned_at = await server.sample("multilora_engine_last_turn_timestamp_seconds")
        assert turned_at == pytest.approx(time.time() - 6, abs=1)


async def test_the_port_answers_while_the_loop_of_the_rpcs_is_stuck(server: Harness) -> None:
    answers: list[bytes] = []

    def ask() -> None:
        for path in ("/livez", "/metrics", "/metrics/router", "/readyz"):
            url = f"http://127.0.0.1:{server.app.metrics_port}{path}"
            with urllib.request.urlopen(url, timeout=5) as reply:
                answers.append(reply.read())

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(5)  # on the loop: nothing else runs there meanwhile
    assert len(answers) == 4


# HTTP


async def test_a_connection_is_kept_and_wrong_requests_are_refused(server: Harness) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.app.metrics_port)

    async def ask(text: str) -> tuple[str, bytes]:
        writer.write(text.encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
        return head.split("\r\n")[0], b"" if text.startswith("HEAD") else await reader.readexactly(length)

    assert await ask("GET /livez?verbose HTTP/1.1\r\nHost: x\r\n\r\n") == ("HTTP/1.1 200 OK", b"ok\n")
    assert await ask("HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n") == ("HTTP/1.1 200 OK", b"")
    assert (await ask("GET /secret HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == "HTTP/1.1 404 Not Found"
    assert (await ask("DELETE /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == "HTTP/1.1 405 Method Not Allowed"
    assert (await ask("GET /livez HTTP/1.1\r\nContent-Length: 3\r\n\r\n"))[0] == "HTTP/1.1 400 Bad Request"
    assert await reader.read() == b"", "a body that is not read could be taken for the next request"
    writer.close()


@pytest.mark.parametrize("sent", [b"nonsense\r\n\r\n", b"GET /livez HTTP/1.1\r\nno colon\r\n\r\n", b"x" * 40_000])
async def test_garbage_ends_its_connection_alone(server: Harness, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.app.metrics_port)
    writer.write(sent)
    assert (await reader.read()).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    writer.close()
    assert (await get(server, "/livez"))[0] == 200


async def test_connections_that_ask_nothing_are_bounded(server: Harness) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.app.metrics_port)) for _ in range(80)]
    await asyncio.sleep(0.2)
    closed = 0
    for connection in idle:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            closed += connection.recv(1) == b""
    assert closed == 16
    for connection in idle:
        connection.close()


# The router's page


def samples_of(text: str) -> dict[str, list[Any]]:
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


async def test_a_router_reads_a_few_gauges_and_one_sample_of_adapters(server: Harness) -> None:
    server.engine.num_waiting = 3
    for adapter in ("spam", "topics"):
        await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter=adapter, wait=True))
    before = time.time()
    status, text = await get(server, "/metrics/router")
    families = samples_of(text)
    assert status == 200
    assert len(families) <= 10
    assert families.keys() == {name for name, series in SERIES.items() if series.page is not Page.METRICS}
    assert all(len(samples) == 1 for samples in families.values())
    assert families["multilora_requests_waiting"][0].value == 3
    info = families["multilora_lora_requests_info"][0]
    assert info.labels["running_lora_adapters"] == "default/spam,default/topics"
    assert info.labels["waiting_lora_adapters"] == ""
    assert int(info.labels["max_lora"]) == 512 * 2**20 // RESIDENT_BYTES
    assert before - 60 < info.value < time.time()
    await server.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter="spam"))
    after = samples_of((await get(server, "/metrics/router"))[1])["multilora_lora_requests_info"]
    assert [sample.labels["running_lora_adapters"] for sample in after] == ["default/topics"]
    assert after[0].value > info.value
    assert "lora_requests_info" not in await server.metrics(), "each change would be a new series"


# /debug/state


async def test_an_operator_sees_the_state_and_no_text(adapter_root: Path) -> None:
    async with running(adapter_root) as server:
        await server.inference.Classify(classify_request("spam", "private words"))
        status, text = await get(server, "/debug/state")
        state = json.loads(text)
        assert status == 200
        assert state["phase"] == "serving"
        assert state["live"] is True
        assert state["adapters"]["by_state"]["READY"] == 1
        assert state["adapters"]["failed"][0]["adapter"] == "default/garbled@1"
        assert state["adapters"]["largest_resident"][0]["bytes"] == RESIDENT_BYTES
        assert state["admission"] == {"sequences": 0, "limit": 4096}
        assert state["versions"]["multilora"]
        assert "private" not in text
        assert (await get(server, "/debug/state", host_="evil.example"))[0] == 403, "a browser was led here"


async def test_the_state_is_an_operators_where_there_are_credentials(adapter_root: Path, tmp_path: Path) -> None:
    door = make_door(tmp_path / "door")
    operator, tenant = door.key("ops", Role.OPERATOR), door.key("acme", Role.INFER, Role.ADAPTERS)
    log = tmp_path / "audit.jsonl"
    async with running(adapter_root, auth=door.auth, audit_log=log) as server:
        assert (await get(server, "/debug/state"))[0] == 401
        assert (await get(server, "/debug/state", authorization="Bearer mlk_wrong"))[0] == 401
        assert (await get(server, "/debug/state", authorization=tenant))[0] == 403
        status, text = await get(server, "/debug/state", authorization=operator)
        assert status == 200
        assert operator.removeprefix("Bearer ") not in text
    denials = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["outcome"] for line in denials] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED"]


# Series


async def test_errors_are_counted_by_their_reason(server: Harness) -> None:
    await failure_of(server.inference.Classify(classify_request("absent", "x")))
    await failure_of(server.inference.Classify(classify_request("spam", *"123456789")))
    assert await server.sample('multilora_rejections_total{reason="ADAPTER_NOT_FOUND"}') == 1
    assert await server.sample('multilora_rejections_total{reason="INVALID_REQUEST"}') == 1


async def test_tokens_and_requests_are_counted_by_adapter(server: Harness) -> None:
    await server.inference.Classify(classify_request("spam", "one", "two words"))
    of_spam = 'tenant="default",version="1"}'
    requests = f'multilora_adapter_requests_total{{adapter="spam",outcome="ok",{of_spam}'
    assert await server.sample(requests) == 1
    assert await server.sample(f'multilora_adapter_input_tokens_total{{adapter="spam",{of_spam}') == 7
    assert await server.sample("multilora_input_tokens_total") == 7


async def test_memory_of_an_accelerator_is_there_or_absent(server: Harness) -> None:
    assert "\nmultilora_accelerator_allocated_bytes " not in await server.metrics()
    assert "\nmultilora_host_used_bytes " not in await server.metrics()
    assert server.runtime is not None
    server.runtime.runner_stats = RunnerStats(device_memory=DeviceMemory(10, 20, 30))
    for name, value in (("allocated", 10), ("reserved", 20), ("capacity", 30)):
        assert await server.sample(f"multilora_accelerator_{name}_bytes") == value


async def test_versions_are_told(server: Harness) -> None:
    (line,) = [line for line in (await server.metrics()).splitlines() if line.startswith("multilora_build_info{")]
    assert line.endswith("} 1.0")


def info_of(number: int, state: AdapterState, **more: Any) -> AdapterInfo:
    return AdapterInfo(AdapterId("acme", f"adapter-{number:05}", 1), "x", None, state, CARD, **more)


def test_a_load_is_timed_by_stage() -> None:
    now = [0.0]
    metrics = ServerMetrics()
    observer = EngineMetrics(metrics, clock=lambda: now[0])
    moves = ((0.0, "REGISTERED"), (1.0, "FETCHING"), (3.0, "HOST"), (3.5, "COPYING"), (4.5, "READY"))
    for at, state in moves:
        now[0] = at
        observer.on_adapter(info_of(1, AdapterState(state), load_seconds=3.5))
    seconds = {
        stage: metrics.registry.get_sample_value("multilora_adapter_load_stage_seconds_sum", {"stage": stage})
        for stage in ("fetch", "room", "copy")
    }
    assert seconds == {"fetch": 2.0, "room": 0.5, "copy": 1.0}
    observer.on_evicted(info_of(1, AdapterState.READY).id, "device")
    assert metrics.registry.get_sample_value("multilora_adapter_evictions_total", {"tier": "device"}) == 1


async def test_a_scrape_of_ten_thousand_adapters_is_small_and_quick(adapter_root: Path, capsys: Any) -> None:
    """Samples are bounded; the time is asserted with a wide margin, since machines differ, and printed."""
    async with running(adapter_root) as server:
        observer = server.app._operations.engine_metrics  # pyright: ignore[reportPrivateUsage]
        states = [AdapterState.REGISTERED, AdapterState.READY, AdapterState.FETCHING]
        refused = AdapterRejected("NOT_FINITE", "x", "y")
        for number in range(10_000):
            info = info_of(number, states[number % 3], resident_bytes=100 * (number % 3 == 1))
            observer.on_adapter(info)
            request = Request("r", info.id, Task.EMBED, (TokenSequence((1, 2), None),))
            result = Result(info.id, "d", CARD, (), Timings(0.001, 0.0, 0.002))
            for _ in range(1 + number % 7):
                observer.on_result(request, result)
            observer.on_result(request, refused)
        seconds = {"/metrics": [], "/metrics/router": []}
        sizes: dict[str, int] = {}
        for path, taken in seconds.items():
            for _ in range(10):
                started = time.perf_counter()
                _, text = await get(server, path)
                taken.append(time.perf_counter() - started)
            sizes[path] = sum(not line.startswith("#") for line in text.splitlines())
        best = {path: min(taken) for path, taken in seconds.items()}
        with capsys.disabled():
            found = (f"{path} {1e3 * seconds:.1f} ms, {sizes[path]} samples" for path, seconds in best.items())
            print("\n10,000 adapters:", *found, sep="\n  ")
        assert sizes["/metrics"] < 700
        assert sizes["/metrics/router"] <= 10
        assert best["/metrics"] < 0.1
        assert best["/metrics/router"] < 0.05
        assert text.count("acme/") <= 1000, "the lists of a router have a bound"
        by_adapter = [line for line in (await server.metrics()).splitlines() if 'tenant="acme",version' in line]
        assert len(by_adapter) == 20 * 4
