"""Clients: so many calls in flight, each answer checked, each latency kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from grpc import aio

from server.bench.adapters.reference import Question, Reference
from server.pb.multilora.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

CALL_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Calls:
    """What a number of calls came to."""

    seconds: list[float] = field(default_factory=list[float])  # of those answered
    failures: dict[str, int] = field(default_factory=dict[str, int])  # by status code


class Client:
    """The stubs of one channel."""

    def __init__(self, channel: aio.Channel) -> None:
        self.inference: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters: adapters_pb2_grpc.AdapterServiceAsyncStub = adapters_pb2_grpc.AdapterServiceStub(channel)

    async def ask(self, reference: Reference, question: Question) -> tuple[inference_pb2.ClassifyResponse, float]:
        """The reply, which is right, and its seconds."""
        started = time.perf_counter()
        reply = await self.inference.Classify(reference.request(question), timeout=CALL_TIMEOUT_S)
        seconds = time.perf_counter() - started
        reference.check(question, reply)
        return reply, seconds

    async def load(self, adapter: str) -> adapters_pb2.Adapter:
        request = adapters_pb2.LoadAdapterRequest(adapter=adapter, wait=True)
        return (await self.adapters.LoadAdapter(request, timeout=CALL_TIMEOUT_S)).adapter

    async def unload(self, adapter: str) -> None:
        await self.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter=adapter), timeout=CALL_TIMEOUT_S)

    async def list_all(self, **filters: int) -> list[adapters_pb2.Adapter]:
        """Every page of ListAdapters."""
        found: list[adapters_pb2.Adapter] = []
        token = ""
        while True:
            page = await self.adapters.ListAdapters(
                adapters_pb2.ListAdaptersRequest(page_size=1000, page_token=token, tenant="-", **filters)  # pyright: ignore[reportArgumentType]
            )
            found += page.adapters
            token = page.next_page_token
            if not token:
                return found

    async def unload_all(self) -> None:
        for adapter in await self.list_all(state=adapters_pb2.ADAPTER_STATE_READY):
            await self.unload(adapter.name)


@asynccontextmanager
async def connect(target: str) -> AsyncGenerator[Client]:
    """A client of a server, with a connection of its own that is up."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
    async with aio.insecure_channel(target, options=options) as channel:
        await channel.channel_ready()
        yield Client(channel)


async def in_flight(
    client: Client,
    reference: Reference,
    questions: Iterator[Question],
    count: int,
    goes_on: Callable[[], bool] = lambda: True,
) -> Calls:
    """Keep `count` calls in flight until the questions end or `goes_on` says so."""
    calls = Calls()

    async def one() -> None:
        while goes_on() and (question := next(questions, None)) is not None:
            try:
                calls.seconds.append((await client.ask(reference, question))[1])
            except grpc.RpcError as error:
                code = error.code().name
                calls.failures[code] = calls.failures.get(code, 0) + 1

    await asyncio.gather(*(one() for _ in range(count)))
    return calls
