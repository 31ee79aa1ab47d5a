"""What every RPC of ours shares: a request id, errors as statuses, a count and a duration."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from lora_runtime.errors import InvalidRequest, MultiloraError
from server.metrics import ServerMetrics
from server.rpc.caller import CallInfo, current_call
from server.rpc.context import Context, remaining_seconds
from server.rpc.errors import STATUS_DETAILS_KEY, RpcStatus, internal_status, to_status
from server.tenancy.audit import AuditLog
from server.tenancy.authenticate import Unauthenticated
from server.tenancy.gate import Gate

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OURS = "/multilora."
_CONTROL = "multilora.v1.AdapterService/"
_DENIALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

_log = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Unary: TypeAlias = Callable[[Any, Context], Awaitable[Any]]
Streaming: TypeAlias = Callable[[Any, Context], AsyncGenerator[Any]]
Parse: TypeAlias = Callable[[bytes], Any]


class RpcInterceptor(aio.ServerInterceptor):
    """Wraps the methods of our own services. Others (health, reflection) pass untouched, or only with a credential."""

    def __init__(self, metrics: ServerMetrics, gate: Gate, audit: AuditLog, closed: Collection[str] = ()) -> None:
        """`closed` are prefixes of foreign methods that need a credential, such as `/grpc.reflection`."""
        self._metrics = metrics
        self._gate = gate
        self._audit = audit
        self._closed = tuple(closed)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        # None: a method that no service has; grpc answers UNIMPLEMENTED
        if handler is None:
            return None
        if method.startswith(_OURS):
            return self._wrapped(handler, method.removeprefix("/"))
        if method.startswith(self._closed) and not await self._may_enter(handler_call_details):
            return _DENIED
        return handler

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        """Requests are parsed by us: what cannot be parsed is an error with a reason, counted as any other."""
        parse = cast("Parse", handler.request_deserializer)
        serialise = handler.response_serializer
        if handler.unary_unary is not None:
            call = self._unary(method, cast("Unary", handler.unary_unary), lambda data: _parsed(data, parse))
            return grpc.unary_unary_rpc_method_handler(call, None, serialise)
        if handler.stream_unary is not None:
            call = self._unary(method, cast("Unary", handler.stream_unary), lambda data: _parsed_all(data, parse))
            return grpc.stream_unary_rpc_method_handler(call, None, serialise)
        assert handler.unary_stream is not None, f"{method} streams both ways, which is not handled yet"
        stream = self._streaming(method, cast("Streaming", handler.unary_stream), parse)
        return grpc.unary_stream_rpc_method_handler(stream, None, serialise)

    def _unary(self, method: str, behaviour: Unary, parse: Callable[[Any], Any]) -> Unary:
        async def call(data: Any, context: Context) -> Any:
            async with self._call(method, context):
                return await behaviour(parse(data), context)

        return call

    def _streaming(self, method: str, behaviour: Streaming, parse: Parse) -> Streaming:
        async def call(data: Any, context: Context) -> AsyncGenerator[Any]:
            async with self._call(method, context), aclosing(behaviour(_parsed(data, parse), context)) as replies:
                async for reply in replies:
                    yield reply

        return call

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncGenerator[None]:
        """One RPC from its arrival to its end: its id, its status, its count."""
        started = time.perf_counter()
        code, reason = grpc.StatusCode.UNKNOWN, ""
        request_id = _request_id(context)
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        info: CallInfo | None = None
        try:
            principal = await self._gate.authenticate(
                tuple(context.invocation_metadata() or ()), context.auth_context()
            )
            info = CallInfo(principal, self._gate.policy)
            current_call.set(info)
            yield
            code = grpc.StatusCode.OK
        except MultiloraError as error:
            status, reason = to_status(error), error.reason
            if status.code is grpc.StatusCode.INTERNAL:  # the runtime's own fault, which it has logged
                _log.error("request %s: %s failed: %s", request_id, method, error.message)
                status = internal_status(request_id)
            code = status.code
            await _abort(context, status, request_id)
        except (asyncio.CancelledError, GeneratorExit):
            code = _why_cancelled(context)
            raise
        except Exception:  # noqa: BLE001 - the last line: nothing internal may leak to the caller
            _log.exception("request %s: %s failed unexpectedly", request_id, method)
            code = grpc.StatusCode.INTERNAL
            await _abort(context, internal_status(request_id), request_id)
        finally:
            self._metrics.observe_rpc(method, code.name, time.perf_counter() - started)
            if method.startswith(_CONTROL) or code in _DENIALS:
                self._audit.record(
                    info.principal if info else None,
                    method,
                    outcome=code.name,
                    request_id=request_id,
                    target=info.target if info else "",
                    reason=reason,
                    peer=context.peer(),
                )

    async def _may_enter(self, details: grpc.HandlerCallDetails) -> bool:
        """Whether a foreign method may be called; who came by a client certificate has shown it already."""
        if self._gate.uses_client_certificates:
            return True
        try:
            await self._gate.authenticate(details.invocation_metadata or (), {})
        except Unauthenticated:
            return False
        return True


async def _deny(messages: Any, context: Context) -> AsyncGenerator[Any]:
    del messages
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, Unauthenticated().message)
    yield  # never reached: it makes a stream of this


_DENIED = grpc.stream_stream_rpc_method_handler(_deny)


def _parsed(data: bytes, parse: Parse) -> Any:
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidRequest("request", "is no message of this method; check the client's protos") from error


async def _parsed_all(messages: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
    async for data in messages:
        yield _parsed(data, parse)


def _request_id(context: Context) -> str:
    """The caller's id, so that its logs and ours can be joined, or a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def _why_cancelled(context: Context) -> grpc.StatusCode:
    remaining_s = remaining_seconds(context)
    expired = remaining_s is not None and remaining_s <= 0
    return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED


async def _abort(context: Context, status: RpcStatus, request_id: str) -> NoReturn:
    trailers = ((REQUEST_ID_KEY, request_id), (STATUS_DETAILS_KEY, status.details))
    await context.abort(status.code, status.message, trailing_metadata=trailers)
