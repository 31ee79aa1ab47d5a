"""The object graph of a server and its life: listen, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from grpc import aio
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from lora_runtime.types import AdapterInfo, AdapterState
from server.admission import Admission
from server.backend import Backend, BackendSlot, completion
from server.control.events import EventLog, EventObserver
from server.control.setup import Control
from server.control.watcher import RootWatcher
from server.early_refusal import EarlyRefusal
from server.metrics import ServerMetrics
from server.operations.setup import Operations
from server.pb.multilora.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from server.pb.open_inference import grpc_service_pb2_grpc
from server.rpc.adapters import AdapterService
from server.rpc.checks import Bounds
from server.rpc.health import Health
from server.rpc.inference import GENERATE_STREAM_METHOD, InferenceService
from server.rpc.interceptors import RpcInterceptor
from server.rpc.open_inference.service import SERVICE as OPEN_INFERENCE
from server.rpc.open_inference.service import STREAM_METHOD as OPEN_INFERENCE_STREAM
from server.rpc.open_inference.service import OpenInferenceService
from server.rpc.path import InferencePath
from server.rpc.usage import UsageService
from server.settings import MIB, ServeSettings, is_loopback
from server.startup import BackendFactory, Prepared, StartupError, load_runtime
from server.tenancy.setup import Tenancy
from server.tokenize import TokenizerPool

SERVICES: tuple[str, ...] = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    usage_pb2.DESCRIPTOR.services_by_name["UsageService"].full_name,
    OPEN_INFERENCE,
)
# By then no RPC is left, so the engine has at most one batch to finish.
_ENGINE_DRAIN_S = 1.0
_NEVER_MS = 2**31 - 1  # what gRPC takes for "never"

T = TypeVar("T")

_log = logging.getLogger(__name__)


class EngineFailed(Exception):
    """The engine's thread ended by itself: nothing can be answered any more."""


class App:
    """One server. `run` is its whole life; tests give it a factory of fake backends."""

    def __init__(self, settings: ServeSettings, factory: BackendFactory = load_runtime) -> None:
        self._settings = settings
        self._factory = factory
        self._slot = BackendSlot()
        self._backend: Backend | None = None
        self._loading: Future[Prepared] | None = None
        self._metrics = ServerMetrics()
        self._events = EventLog()
        self._tenancy = Tenancy(settings, self._metrics)
        self._control = Control(settings, self._slot)
        self._watching: asyncio.Task[None] | None = None
        early = EarlyRefusal(self._tenancy.shares.weight_of) if settings.refuse_early else None
        self._admission = Admission(settings.max_queued_sequences, early=early)
        self._tokenizers = TokenizerPool(settings.tokenizer_threads)
        self._health = Health(SERVICES)
        self._server: aio.Server | None = None
        self._operations = Operations(
            settings, self._metrics, self._tenancy, self._admission, self._health, lambda: self._backend
        )
        self._open_inference: OpenInferenceService | None = None
        self.port = settings.port

    @property
    def metrics_port(self) -> int:
        return self._operations.port

    async def run(
        self, stop: asyncio.Event, announce: Callable[[str], None], settle: Callable[[], None] = lambda: None
    ) -> None:
        """Serve until `stop` is set; `announce` gets the text for people when requests are answered.

        `settle` is called once everything is loaded, before the first request.

        Raises StartupError when an address is taken, the base cannot be served or a preload fails; EngineFailed when
        the engine ended before it was told to.
        """
        try:
            await self.listen()
            if await self.load(stop, settle):
                announce(self.summary())
                await self._until(stop)
                _log.info("stopping; requests in flight have %g seconds", self._settings.grace)
        finally:
            await self.close()

    async def listen(self) -> None:
        """Answer health (NOT_SERVING) and metrics; other RPCs are UNAVAILABLE until `load` is done."""
        settings = self._settings
        # checked first: a failed bind of gRPC's own prints its internals
        _require_free_port("--port", settings.host, settings.port)
        try:
            self._operations.listen()
        except OSError as error:
            raise _cannot_listen("--metrics-port", settings.metrics_host, settings.metrics_port, error) from error
        self._server = self._build_server()
        address = _address(settings.host, settings.port)
        try:
            credentials = self._tenancy.credentials
            self.port = (
                self._server.add_insecure_port(address)
                if credentials is None
                else self._server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            raise StartupError(f"--host, --port: cannot listen on {address}; choose another address") from error
        await self._health.attach(self._server)
        if self._tenancy.gate.is_open:
            _log.warning("--auth none: anybody on this machine may do anything")
        elif self._tenancy.credentials is None and not is_loopback(settings.host):
            _log.warning("--host %s without TLS: keys and texts can be read on the way; see --tls-cert", settings.host)
        await self._server.start()
        self._tenancy.start()

    async def load(self, stop: asyncio.Event, settle: Callable[[], None] = lambda: None) -> bool:
        """Load base and preloads, then serve. False when `stop` was set meanwhile."""
        observers = (self._operations.engine_metrics, EventObserver(self._events), self._tenancy.meter)
        self._loading = _in_daemon_thread(lambda: self._control.prepare(self._factory, observers))
        loaded = asyncio.ensure_future(completion(self._loading))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait({loaded, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not loaded.done():
            loaded.cancel()
            return False
        prepared = loaded.result()
        settle()
        self._backend = prepared.backend
        self._backend.engine.use_shares(self._tenancy.shares)
        self._slot.publish(self._backend)
        if self._settings.watch_seconds:
            watcher = RootWatcher(self._control.plane, self._settings.adapters, prepared.scan)
            self._watching = asyncio.create_task(watcher.run(self._settings.watch_seconds))
        await self._health.serve()
        return True

    async def close(self) -> None:
        """Report NOT_SERVING, give requests in flight `grace` seconds, then stop. Safe at any stage."""
        await self._health.drain()
        if self._open_inference is not None:
            self._open_inference.drain()
        if self._server is not None:
            if self._backend is not None:
                await asyncio.sleep(self._settings.drain_delay)
            self._events.close()  # watchers never finish by themselves
            if self._open_inference is not None:
                self._open_inference.close()  # nor do streams whose client waits to ask more
            await self._server.stop(self._settings.grace)
        if self._watching is not None:
            self._watching.cancel()
        await self._control.plane.close()
        self._slot.withdraw()
        backend = self._backend or await self._late_backend()
        if backend is not None:
            await asyncio.to_thread(backend.close, _ENGINE_DRAIN_S)
        self._control.close()
        self._tokenizers.close()
        await asyncio.to_thread(self._tenancy.close)
        await asyncio.to_thread(self._operations.close)

    def summary(self) -> str:
        """What people read when the server is up."""
        assert self._backend is not None, "there is nothing to announce before the backend is loaded"
        adapters = self._backend.engine.catalogue.all()
        state = self._settings.state or "not kept: registrations and aliases end with the server (--state keeps them)"
        return "\n".join(
            (
                "multilora is serving",
                f"  gRPC      {_address(self._settings.host, self.port)}",
                f"  metrics   http://{_address(self._settings.metrics_host, self.metrics_port)}/metrics",
                f"  base      {self._backend.base_name}",
                f"  adapters  {_census(adapters)}",
                f"  state     {state}",
            )
        )

    def _build_server(self) -> aio.Server:
        limit = self._settings.max_message_mib * MIB
        age_ms = round(self._settings.connection_age * 1000) or _NEVER_MS
        server = aio.server(
            interceptors=[
                RpcInterceptor(
                    self._metrics,
                    self._tenancy.gate,
                    self._tenancy.audit,
                    self._tenancy.closed_methods,
                    dict.fromkeys((GENERATE_STREAM_METHOD, OPEN_INFERENCE_STREAM), self._settings.stream_stall_seconds),
                )
            ],
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not take half of the calls
                ("grpc.max_receive_message_length", limit),
                ("grpc.keepalive_time_ms", 60_000),  # notices clients that vanished behind a NAT
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.max_connection_age_ms", age_ms),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients may ping as often
            ],
        )
        path, adapters = self._inference_path(), AdapterService(self._control.plane, self._events)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(path), server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)
        self._open_inference = OpenInferenceService(
            self._slot, path, adapters, self._tenancy.meter, self._settings.max_inputs
        )
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._open_inference, server)
        usage_pb2_grpc.add_UsageServiceServicer_to_server(UsageService(self._tenancy.meter), server)
        if self._settings.reflection != "off":
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _inference_path(self) -> InferencePath:
        settings = self._settings
        bounds = Bounds(settings.max_inputs, settings.max_input_chars, settings.max_new_tokens)
        return InferencePath(self._slot, self._admission, self._tenancy.limits, self._tokenizers, self._metrics, bounds)

    async def _until(self, stop: asyncio.Event) -> None:
        assert self._backend is not None, "there is nothing to serve with"
        ended = asyncio.ensure_future(completion(self._backend.engine.ended))
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            ended.cancel()
            return
        stopped.cancel()
        raise EngineFailed("the engine failed and the server ends; the log has the cause") from ended.exception()

    async def _late_backend(self) -> Backend | None:
        """The backend of a load that the stop overtook, if it arrives within `grace` seconds.

        Loading a base cannot be interrupted; its thread is a daemon and does not keep the process.
        """
        if self._loading is None:
            return None
        try:
            return (await asyncio.wait_for(completion(self._loading), self._settings.grace)).backend
        except TimeoutError:
            return None
        except Exception as error:  # noqa: BLE001 - `load` has raised it, or nobody needs the base any more
            _log.debug("nothing to close: %s", error)
            return None


def _census(adapters: Sequence[AdapterInfo]) -> str:
    ready = sum(info.state is AdapterState.READY for info in adapters)
    failed = sum(info.state is AdapterState.FAILED for info in adapters)
    return f"{len(adapters)} registered, {ready} loaded" + (f", {failed} refused (see the log)" if failed else "")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _require_free_port(flag: str, host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what waits in TIME_WAIT does not listen
            probe.bind(address)
    except OSError as error:
        raise _cannot_listen(flag, host, port, error) from error


def _cannot_listen(flag: str, host: str, port: int, error: OSError) -> StartupError:
    if error.errno == errno.EADDRINUSE:
        return StartupError(f"{flag}: {_address(host, port)} is in use; stop what listens there or choose another port")
    return StartupError(f"--host, {flag}: cannot listen on {_address(host, port)} ({error.strerror})")


def _in_daemon_thread(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the future raises it
            future.set_exception(error)

    threading.Thread(target=run, name="load-base", daemon=True).start()
    return future
