"""A real Prometheus reads a server, and its alerts fire for the faults that are made, and for no others."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, classify_request, failure_of, running

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = shutil.which("prometheus")
EVERY = "400ms"

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")


def hurried_rules() -> dict[str, Any]:
    """The rules as they are, but looked at many times a second, and without the minutes that an alert waits."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "multilora.rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = EVERY
    return rules


class Prometheus:
    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    async def ask(self, path: str) -> Any:
        def fetch() -> Any:
            with urllib.request.urlopen(f"{self._base}/api/v1/{path}", timeout=5) as reply:
                return json.load(reply)["data"]

        return await asyncio.to_thread(fetch)

    async def firing(self) -> dict[str, dict[str, str]]:
        """Labels of what fires, by the alert's name."""
        alerts = (await self.ask("alerts"))["alerts"]
        return {one["labels"]["alertname"]: one["labels"] for one in alerts if one["state"] == "firing"}

    async def until_scraped(self, times: int) -> None:
        """Wait until the server was read that often, and the rules were evaluated on it."""
        query = f"query?query=count_over_time(multilora_build_info[1h])>={times}"
        async with asyncio.timeout(15):
            while True:
                try:
                    if (await self.ask(query))["result"]:
                        break
                except OSError:  # it does not listen yet
                    pass
                await asyncio.sleep(0.1)
        await asyncio.sleep(1)  # more than one evaluation


@asynccontextmanager
async def prometheus(folder: Path, target_port: int) -> AsyncGenerator[Prometheus]:
    assert PROMETHEUS is not None
    (folder / "rules.yaml").write_text(yaml.safe_dump(hurried_rules()))
    configuration = {
        "global": {"scrape_interval": EVERY, "scrape_timeout": EVERY, "evaluation_interval": EVERY},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": "multilora", "static_configs": [{"targets": [f"127.0.0.1:{target_port}"]}]},
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    log = (folder / "log").open("wb")
    process = await asyncio.create_subprocess_exec(
        PROMETHEUS,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stderr=log,
        stdout=log,
    )
    try:
        yield Prometheus(port)
    except TimeoutError as error:
        raise AssertionError((folder / "log").read_text()[-3000:]) from error
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        log.close()


async def fill(server: Harness) -> list[asyncio.Task[Any]]:
    """Hold the engine, and take every permit."""
    server.engine.gate.clear()
    held = [asyncio.ensure_future(server.inference.Classify(classify_request("spam", "one"))) for _ in range(8)]
    await server.until_admitted(8)
    return held


async def test_the_right_alerts_fire_for_the_faults_that_are_made(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters" / "spam", labels=["ham", "spam"])
    write_adapter(tmp_path / "adapters" / "nan", labels=["no", "yes"], weights="broken")
    (tmp_path / "prometheus").mkdir()
    async with (
        running(tmp_path / "adapters", max_inputs=8, max_queued_sequences=8) as server,
        prometheus(tmp_path / "prometheus", server.app.metrics_port) as watcher,
    ):
        await server.inference.Classify(classify_request("spam", "one"))
        await watcher.until_scraped(3)
        (target,) = (await watcher.ask("targets"))["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        assert all(
            rule["health"] == "ok" for group in (await watcher.ask("rules"))["groups"] for rule in group["rules"]
        )
        assert await watcher.firing() == {}
        await every_panel_is_answered(watcher)

        failure = await failure_of(server.inference.Classify(classify_request("nan", "one")))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        firing = await until_firing(watcher, {"MultiloraAdapterLoadsFail"})
        assert firing["MultiloraAdapterLoadsFail"]["reason"] == "NOT_FINITE"
        assert firing.keys() == {"MultiloraAdapterLoadsFail"}

        server.engine.turned_at = time.monotonic() - 100
        held = await fill(server)
        wanted = {"MultiloraAdapterLoadsFail", "MultiloraEngineStalled", "MultiloraRejects"}
        firing = await until_firing(watcher, wanted, server)
        assert firing.keys() == wanted
        assert firing["MultiloraRejects"]["instance"] == f"127.0.0.1:{server.app.metrics_port}"
        server.engine.gate.set()
        await asyncio.gather(*held)


async def every_panel_is_answered(watcher: Prometheus) -> None:
    """What parses may still fail when it is evaluated: two sides that do not match one to one."""
    variables = {"$__rate_interval": "1m", "$__range": "1h", "$job": ".*", "$instance": ".*", "$tenant": ".*"}
    answered: set[str] = set()
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression: str = target["expr"]
                for variable, value in variables.items():
                    expression = expression.replace(variable, value)
                reply = await watcher.ask(f"query?{urllib.parse.urlencode({'query': expression})}")
                if reply["result"]:
                    answered.add(f"{path.stem}: {panel['title']}")
    assert {"overview: Servers", "overview: Permits in use", "adapters: On the device", "engine: Requests"} <= answered
    assert {"overview: Latency", "adapters: Adapters by state", "tenants: In the time shown"} <= answered


async def until_firing(watcher: Prometheus, names: set[str], full: Harness | None = None) -> dict[str, dict[str, str]]:
    """Wait for those alerts; meanwhile ask a server that is full for more."""
    async with asyncio.timeout(20):
        while not names <= (firing := await watcher.firing()).keys():
            if full is not None:
                failure = await failure_of(full.inference.Classify(classify_request("spam", "one")))
                assert failure.info.reason == "CAPACITY_EXCEEDED"
            await asyncio.sleep(0.1)
    return firing
