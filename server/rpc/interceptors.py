"""What every RPC of ours shares: a request id, errors as statuses, a count and a duration."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from lora_runtime.errors import InvalidRequest, MultiloraError
from server.metrics import ServerMetrics
from server.rpc.context import Context, remaining_seconds
from server.rpc.errors import STATUS_DETAILS_KEY, RpcStatus, internal_status, to_status

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OURS = "/multilora."

_log = logging.getLogger(__name__)

Method: TypeAlias = Callable[[Any, Context], Awaitable[Any]]
Parse: TypeAlias = Callable[[bytes], Any]


class RpcInterceptor(aio.ServerInterceptor):
    """Wraps the unary methods of our own services; health and reflection pass untouched."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        # None: a method that no service has; grpc answers UNIMPLEMENTED
        if handler is None or not method.startswith(_OURS) or handler.unary_unary is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            self._wrap(
                method.removeprefix("/"),
                cast("Method", handler.unary_unary),
                cast("Parse", handler.request_deserializer),
            ),
            request_deserializer=None,  # by us: what cannot be parsed is an error with a reason, counted as any other
            response_serializer=handler.response_serializer,
        )

    def _wrap(self, method: str, behaviour: Method, parse: Parse) -> Method:
        async def call(data: Any, context: Context) -> Any:
            started = time.perf_counter()
            code = grpc.StatusCode.UNKNOWN
            request_id = _request_id(context)
            context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
            try:
                reply = await behaviour(_parsed(data, parse), context)
                code = grpc.StatusCode.OK
                return reply
            except MultiloraError as error:
                status = to_status(error)
                if status.code is grpc.StatusCode.INTERNAL:  # the runtime's own fault, which it has logged
                    _log.error("request %s: %s failed: %s", request_id, method, error.message)
                    status = internal_status(request_id)
                code = status.code
                await _abort(context, status, request_id)
            except asyncio.CancelledError:
                code = _why_cancelled(context)
                raise
            except Exception:  # noqa: BLE001 - the last line: nothing internal may leak to the caller
                _log.exception("request %s: %s failed unexpectedly", request_id, method)
                code = grpc.StatusCode.INTERNAL
                await _abort(context, internal_status(request_id), request_id)
            finally:
                self._metrics.observe_rpc(method, code.name, time.perf_counter() - started)

        return call


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


async def _abort(context: Context, status: RpcStatus, request_id: str) -> NoReturn:
    trailers = ((REQUEST_ID_KEY, request_id), (STATUS_DETAILS_KEY, status.details))
    await context.abort(status.code, status.message, trailing_metadata=trailers)
