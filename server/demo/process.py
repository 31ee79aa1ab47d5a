"""A real `multilora serve` in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


class ServerDidNotStart(Exception):
    """The server ended, or was not SERVING in time; the message holds its last lines."""


class ServerProcess:
    """Started on free loopback ports; SERVING once entered, stopped by SIGTERM when left unless kept."""

    def __init__(
        self, base: str, adapters: Path, threads: int, port: int | None = None, *, start_limit_s: float = 60
    ) -> None:
        self.port, self.metrics_port = _free_port(port or 0), _free_port()
        self.log = adapters.parent / "server.log"
        self._command = [
            sys.executable, "-c", "from server.cli import app; app()", "serve", "--auth", "none", "--base", base,
            "--adapters", str(adapters), "--port", str(self.port), "--metrics-port", str(self.metrics_port),
            "--threads", str(threads), "--log-format", "text",
        ]  # fmt: skip
        self._start_limit_s = start_limit_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_serving(self._start_limit_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait(self) -> int:
        """Until the server ends by itself; its exit code."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and its exit code; killed when it has not ended after 20 seconds."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _wait_serving(self, seconds: float) -> None:
        assert self._process is not None
        until = time.monotonic() + seconds
        with grpc.insecure_channel(self.target) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)  # its methods are set at run time
            while time.monotonic() < until and self._process.poll() is None:
                try:
                    status = health.Check(health_pb2.HealthCheckRequest(), timeout=1).status
                except grpc.RpcError:
                    status = None
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                time.sleep(0.1)
        last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise ServerDidNotStart("the server did not start: " + " | ".join(last))


def _free_port(wanted: int = 0) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ServerDidNotStart(f"--port: 127.0.0.1:{wanted} is in use; choose another") from error
        return int(probe.getsockname()[1])
