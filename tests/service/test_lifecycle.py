"""Start, readiness and stop, as a client and a load balancer see them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lora_runtime.errors import EngineStopped
from server.app import SERVICES, EngineFailed
from server.pb.multilora.v1 import adapters_pb2
from server.startup import StartupError
from tests.service.harness import Harness, HealthStatus, classify_request, failure_of, running


async def test_nothing_serves_before_the_base_is_loaded(adapter_root: Path) -> None:
    hold = threading.Event()
    async with running(adapter_root, hold_base=hold, preload="spam") as server:
        for service in ("", *SERVICES):
            assert await server.health(service) == HealthStatus.NOT_SERVING
        failures = [
            await failure_of(server.inference.Classify(classify_request("spam", "one"))),
            await failure_of(server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())),
        ]
        assert {failure.code for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
        assert {failure.info.reason for failure in failures} == {"SERVER_STARTING"}
        assert not server.announced

        hold.set()
        await server.until_health(HealthStatus.SERVING)
        for service in SERVICES:
            assert await server.health(service) == HealthStatus.SERVING
        request = adapters_pb2.GetAdapterRequest(adapter="spam")
        adapter = (await server.adapters.GetAdapter(request)).adapter
        assert adapter.state == adapters_pb2.ADAPTER_STATE_READY


def test_health_can_be_answered_before_the_libraries_of_models_are_imported() -> None:
    """They take seconds, in which a server that is alive must not look dead."""
    code = "import sys, server.app; print({'torch', 'transformers'} & set(sys.modules) or 'neither')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "neither"


async def test_the_announcement_says_where_and_what(server: Harness) -> None:
    (text,) = server.announced
    assert f"127.0.0.1:{server.app.port}" in text
    assert f"http://127.0.0.1:{server.app.metrics_port}/metrics" in text
    assert "fake-base" in text
    assert "5 registered, 0 loaded, 1 refused" in text


@pytest.mark.parametrize(("preload", "why"), [("absent", "not registered"), ("spam,nan", "NaN")])
async def test_a_preload_that_fails_stops_the_start(adapter_root: Path, preload: str, why: str) -> None:
    with pytest.raises(StartupError, match=f"--preload.*{why}"):
        async with running(adapter_root, preload=preload):
            pass


async def test_a_stop_while_loading_is_not_a_failure(adapter_root: Path) -> None:
    hold = threading.Event()
    async with running(adapter_root, hold_base=hold, grace=0.2) as server:
        server.stop.set()
        await asyncio.sleep(0.05)
        hold.set()
    assert not server.announced


async def test_requests_in_flight_are_answered_when_the_server_stops(adapter_root: Path) -> None:
    async with running(adapter_root) as server:
        server.engine.gate.clear()
        waiting = server.inference.Classify(classify_request("spam", "one"))
        while await server.sample("multilora_admitted_sequences") == 0:
            await asyncio.sleep(0.01)
        server.stop.set()
        await asyncio.sleep(0.1)
        server.engine.gate.set()
        assert len((await waiting).results) == 1
    assert server.runtime is not None
    assert server.runtime.closed


async def test_health_turns_before_requests_are_refused(adapter_root: Path) -> None:
    async with running(adapter_root, drain_delay=0.5) as server:
        server.stop.set()
        await server.until_health(HealthStatus.NOT_SERVING)
        assert (await server.inference.Classify(classify_request("spam", "one"))).version == 1


@pytest.mark.parametrize("flag", ["port", "metrics_port"])
async def test_a_taken_port_is_named(server: Harness, adapter_root: Path, flag: str) -> None:
    taken = server.app.port if flag == "port" else server.app.metrics_port
    with pytest.raises(StartupError, match=f"--{flag.replace('_', '-')}: .*:{taken} is in use"):
        async with running(adapter_root, **{flag: taken}):
            pass


async def test_reflection_lists_the_services(server: Harness) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)

    async def ask() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async for reply in stub.ServerReflectionInfo(ask()):
        names = {service.name for service in reply.list_services_response.service}
        assert {*SERVICES, "grpc.health.v1.Health"} <= names


async def test_a_server_whose_engine_failed_ends_with_an_error(adapter_root: Path) -> None:
    async def fail(server: Harness) -> None:
        assert server.runtime is not None
        server.engine.ended.set_exception(EngineStopped("the engine failed"))
        async with asyncio.timeout(10):
            while not server.runtime.closed:
                await asyncio.sleep(0.01)

    life = running(adapter_root)
    await fail(await life.__aenter__())
    with pytest.raises(EngineFailed, match="the log has the cause"):
        await life.__aexit__(None, None, None)


async def test_a_folder_that_cannot_be_looked_into_is_skipped(
    adapter_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as lost+found at the root of a volume; tests may run as root, whom no mode stops."""
    is_file = Path.is_file

    def guarded(path: Path) -> bool:
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    (adapter_root / "lost+found").mkdir()
    monkeypatch.setattr(Path, "is_file", guarded)
    async with running(adapter_root) as server:
        assert "5 registered" in server.announced[0]
