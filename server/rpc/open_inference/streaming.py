"""One ModelStreamInfer call: requests are answered side by side, and their responses share the stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeAlias

import grpc

from lora_runtime.errors import EngineStopped, InvalidRequest, MultiloraError
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.context import Context
from server.rpc.errors import code_of
from server.rpc.open_inference.inferring import FINAL, Inferring

MAX_AT_ONCE = 64  # requests of one stream; the next is read when one is answered
_MAX_UNREAD = 16  # responses that wait for the client; then those that make them wait too
_STRICT = "triton_grpc_error"  # metadata: the first error ends the stream

_Message: TypeAlias = pb.ModelStreamInferResponse | BaseException | None  # an error to end with, None: the end


class InferStream:
    """Belongs to the asyncio loop. `stopping` is set when the server wants its streams to end."""

    def __init__(self, inferring: Inferring, stopping: asyncio.Event, context: Context) -> None:
        self._inferring = inferring
        self._stopping = stopping
        self._context = context
        self._is_strict = (_STRICT, "true") in (context.invocation_metadata() or ())
        self._messages: asyncio.Queue[_Message] = asyncio.Queue(_MAX_UNREAD)

    async def run(self, requests: AsyncIterator[pb.ModelInferRequest]) -> AsyncGenerator[pb.ModelStreamInferResponse]:
        """Until the client has sent its last request and all are answered; whatever ends it early ends all of them."""
        reading = asyncio.create_task(self._read(requests))
        try:
            while (message := await self._messages.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                yield message
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Has each request answered; puts what ends the stream: nothing, or an error."""
        slots = asyncio.Semaphore(MAX_AT_ONCE)
        async with asyncio.TaskGroup() as answering:
            try:
                while (request := await self._next(requests)) is not None:
                    await slots.acquire()
                    answering.create_task(self._answer(request)).add_done_callback(lambda _: slots.release())
            except Exception as error:  # noqa: BLE001 - the call raises it, at once
                await self._messages.put(error)
        is_cut = self._stopping.is_set()
        await self._messages.put(EngineStopped("the server stops; open a stream elsewhere") if is_cut else None)

    async def _next(self, requests: AsyncIterator[pb.ModelInferRequest]) -> pb.ModelInferRequest | None:
        """The next request; None after the last, and when the server stops."""
        coming = asyncio.ensure_future(anext(requests, None))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({coming, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return coming.result() if coming.done() else None
        finally:
            for task in (coming, stopping):
                task.cancel()
            await asyncio.gather(coming, stopping, return_exceptions=True)

    async def _answer(self, request: pb.ModelInferRequest) -> None:
        """All responses to one request; an error is one of them, unless it is to end the stream."""
        try:
            async with aclosing(self._inferring.stream(request, self._context)) as responses:
                async for response in responses:
                    await self._messages.put(pb.ModelStreamInferResponse(infer_response=response))
        except MultiloraError as error:
            is_ours = code_of(error) is grpc.StatusCode.INTERNAL  # the interceptor logs it, and hides it
            await self._messages.put(error if is_ours or self._is_strict else _failed(request, error))
        except Exception as error:  # noqa: BLE001 - as above
            await self._messages.put(error)


def _failed(request: pb.ModelInferRequest, error: MultiloraError) -> pb.ModelStreamInferResponse:
    response = pb.ModelInferResponse(id=request.id)
    response.parameters[FINAL].bool_param = True
    response.parameters["error_code"].string_param = code_of(error).name
    response.parameters["error_reason"].string_param = error.reason
    if isinstance(error, InvalidRequest):
        response.parameters["error_field"].string_param = error.field
    return pb.ModelStreamInferResponse(error_message=error.message, infer_response=response)
