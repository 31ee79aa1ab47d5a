"""What every RPC of ours shares: a caller, a request id, errors as statuses, a count and a duration."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from lora_runtime.errors import InvalidRequest, MultiloraError
from server.logs import access_log, fields, wants_access
from server.logs import request_id as log_request_id
from server.metrics import ServerMetrics
from server.rpc.caller import CallInfo, aim_at_named, current_call
from server.rpc.context import Context, remaining_seconds
from server.rpc.errors import STATUS_DETAILS_KEY, RpcStatus, internal_status, to_status
from server.rpc.stalls import write
from server.tenancy.audit import AuditLog
from server.tenancy.authenticate import Unauthenticated
from server.tenancy.gate import Gate

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OURS = ("/multilora.", "/inference.")
_CHANGES = frozenset(
    {
        *(f"multilora.v1.AdapterService/{change}Adapter" for change in ("Register", "Upload", "Load", "Unload")),
        *(f"multilora.v1.AdapterService/{change}" for change in ("PinAdapter", "DeleteAdapter", "SetAlias")),
        "multilora.v1.AdapterService/DeleteAlias",
        *(f"inference.GRPCInferenceService/RepositoryModel{change}" for change in ("Load", "Unload")),
    }
)
CHECK_AGAIN_S = 30.0  # how long a stream without replies may outlive its credential
_DENIALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

_log = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Unary: TypeAlias = Callable[[Any, Context], Awaitable[Any]]
Streaming: TypeAlias = Callable[[Any, Context], AsyncGenerator[Any]]
Parse: TypeAlias = Callable[[bytes], Any]


class RpcInterceptor(aio.ServerInterceptor):
    """Wraps the methods of our own services, and those of others (health, reflection) that need a credential."""

    def __init__(
        self,
        metrics: ServerMetrics,
        gate: Gate,
        audit: AuditLog,
        closed: Collection[str] = (),
        stall_s: Mapping[str, float] | None = None,
    ) -> None:
        """`closed` are prefixes of foreign methods that need a credential, such as `/grpc.reflection`.

        `stall_s` are seconds by `package.Service/Method`: how long a message of its stream may wait for the client.
        """
        self._metrics = metrics
        self._gate = gate
        self._audit = audit
        self._closed = tuple(closed)
        self._stall_s = stall_s or {}

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
        if method.startswith((*_OURS, *self._closed)):
            return self._wrapped(handler, method.removeprefix("/"))
        return handler

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        """Requests are parsed by us: what cannot be parsed is an error with a reason, counted as any other."""
        parse = cast("Parse", handler.request_deserializer)
        serialise = handler.response_serializer
        if handler.unary_unary is not None:
            call = self._unary(method, cast("Unary", handler.unary_unary), lambda data: _parsed(data, parse))
            return grpc.unary_unary_rpc_method_handler(call, None, serialise)
        if handler.stream_unary is not None:
            call = self._unary(method, cast("Unary", handler.stream_unary), lambda data: self._parsed_all(data, parse))
            return grpc.stream_unary_rpc_method_handler(call, None, serialise)
        if handler.stream_stream is not None:
            both = cast("Streaming", handler.stream_stream)
            stream = self._streaming(method, both, lambda data: self._parsed_all(data, parse))
            return grpc.stream_stream_rpc_method_handler(stream, None, serialise)
        behaviour: Any = handler.unary_stream
        # one that is no generator writes its replies by itself, as health does
        wrap = self._streaming if inspect.isasyncgenfunction(behaviour) else self._unary
        return grpc.unary_stream_rpc_method_handler(
            wrap(method, behaviour, lambda data: _parsed(data, parse)), None, serialise
        )

    def _unary(self, method: str, behaviour: Unary, parse: Callable[[Any], Any]) -> Unary:
        async def call(data: Any, context: Context) -> Any:
            async with self._call(method, context):
                request = parse(data)
                aim_at_named(request)
                return await behaviour(request, context)

        return call

    def _streaming(self, method: str, behaviour: Streaming, parse: Callable[[Any], Any]) -> Unary:
        """Writes the replies by itself: so a client that goes away, or does not read, ends `behaviour` at once."""

        async def call(data: Any, context: Context) -> None:
            async with self._call(method, context) as info:
                request = parse(data)
                aim_at_named(request)
                async with aclosing(behaviour(request, context)) as replies:
                    while (reply := await self._next(replies, info)) is not None:
                        await self._check_again(info)
                        await write(context, reply, self._stall_s.get(method))

        return call

    async def _next(self, replies: AsyncGenerator[Any], info: CallInfo) -> Any:
        """The next reply, None after the last; raises Unauthenticated when the credential ends before it comes."""
        coming = asyncio.ensure_future(anext(replies, None))
        try:
            while not (await asyncio.wait({coming}, timeout=CHECK_AGAIN_S))[0]:
                await self._check_again(info)
        except BaseException:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)  # else the generator could not be closed
            raise
        return coming.result()

    async def _check_again(self, info: CallInfo) -> None:
        """A stream may outlive its credential; raises Unauthenticated once that says something else, or nothing."""
        if await self._gate.authenticate(info.metadata, info.auth_context) != info.principal:
            raise Unauthenticated

    async def _parsed_all(self, messages: AsyncIterator[bytes], parse: Parse) -> AsyncIterator[Any]:
        async for data in messages:
            await self._check_again(current_call.get())
            yield _parsed(data, parse)

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncGenerator[CallInfo]:
        """One RPC from its arrival to its end: its id, its status, its count."""
        started = time.perf_counter()
        code, reason, key_id = grpc.StatusCode.UNKNOWN, "", ""
        request_id = _request_id(context)
        log_request_id.set(request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        peer = context.peer()  # not later: gRPC crashes when it is asked after the end of the call
        info: CallInfo | None = None
        try:
            metadata, auth_context = tuple(context.invocation_metadata() or ()), context.auth_context()
            principal = await self._gate.authenticate(metadata, auth_context)
            info = CallInfo(principal, self._gate.policy, metadata, auth_context)
            current_call.set(info)
            yield info
            code = grpc.StatusCode.OK
        except MultiloraError as error:
            status, reason = to_status(error), error.reason
            key_id = error.key_id if isinstance(error, Unauthenticated) else ""
            if status.code is grpc.StatusCode.INTERNAL:  # the runtime's own fault, which it has logged
                _log.error("request %s: %s failed: %s", request_id, method, error.message)
                status = internal_status(request_id)
            code = status.code
            await _abort(context, status, request_id)
        except (asyncio.CancelledError, GeneratorExit):
            code = _why_cancelled(context)
            raise
        except aio.AbortError:  # a method of others ended with a status of its own
            code = _status_of(context)
            raise
        except Exception:  # noqa: BLE001 - the last line: nothing internal may leak to the caller
            _log.exception("request %s: %s failed unexpectedly", request_id, method)
            code, reason = grpc.StatusCode.INTERNAL, "INTERNAL"
            await _abort(context, internal_status(request_id), request_id)
        finally:
            self._observe(method, code, reason, time.perf_counter() - started, info)
            if method in _CHANGES or code in _DENIALS or (info is not None and info.is_denied):
                self._audit.record(
                    info.principal if info else None,
                    method,
                    outcome=code.name,
                    request_id=request_id,
                    target=info.target if info else "",
                    versions=info.versions if info else "",
                    reason=reason,
                    peer=peer,
                    key_id=key_id,
                )

    def _observe(self, method: str, code: grpc.StatusCode, reason: str, seconds: float, info: CallInfo | None) -> None:
        """Count one RPC that ended, and have its line in the access log."""
        self._metrics.observe_rpc(method, code.name, seconds)
        if reason:
            self._metrics.count_rejection(reason)
        if wants_access(code.name):
            principal = None if info is None else info.principal
            more = fields(
                method=method,
                code=code.name,
                reason=reason,
                seconds=round(seconds, 6),
                tenant=principal and principal.tenant,
                principal=principal and principal.name,
                adapter=info and info.target,
                **({} if info is None else info.work),
            )
            access_log.info("rpc", extra=more)


def _parsed(data: bytes, parse: Parse) -> Any:
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidRequest("request", "is no message of this method; check the client's protos") from error


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


def _status_of(context: Context) -> grpc.StatusCode:
    number: Any = context.code()
    return next((code for code in grpc.StatusCode if number in (code, code.value[0])), grpc.StatusCode.UNKNOWN)


async def _abort(context: Context, status: RpcStatus, request_id: str) -> NoReturn:
    trailers = ((REQUEST_ID_KEY, request_id), (STATUS_DETAILS_KEY, status.details))
    await context.abort(status.code, status.message, trailing_metadata=trailers)
