"""grpc.health.v1 for the server as a whole ("") and for each of our services."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class Phase(StrEnum):
    """Of a server's life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Health:
    """NOT_SERVING until `serve`, SERVING until `drain`, NOT_SERVING for good after it."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = ("", *services)
        self.phase = Phase.STARTING  # may be read from any thread
        # the type stubs do not know the asyncio half of the package
        self._servicer: Any = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]

    async def attach(self, server: aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        for service in self._services:
            await self._servicer.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def serve(self) -> None:
        self.phase = Phase.SERVING
        for service in self._services:
            await self._servicer.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        self.phase = Phase.DRAINING
        await self._servicer.enter_graceful_shutdown()
