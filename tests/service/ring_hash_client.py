"""Clients that hash the adapter: `python -m tests.service.ring_hash_client TARGET SERVICE_CONFIG ADAPTER…`.

In a process of its own, since gRPC reads GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY once. One client has the
config, one has it without retries and shows each failure. Both ask every adapter ROUNDS times, and `asked` is printed.
After a line on stdin each keeps a call of every adapter in flight until the next line; what failed is asked again.
How all calls ended is printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field

from grpc import aio

from server.pb.multilora.v1 import inference_pb2, inference_pb2_grpc

ROUNDS = 5
_BACKOFF_S = 0.1  # as the documented policy: at once, a call may still be put on the connection that has just ended


@dataclass
class Outcomes:
    """Of the calls under load, by adapter."""

    answered: Counter[str] = field(default_factory=Counter[str])
    failed: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # status codes, in order
    num_failed_again: int = 0  # calls that failed right after one of the same adapter had


class Client:
    def __init__(self, channel: aio.Channel, adapters: list[str]) -> None:
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._adapters = adapters
        self.outcomes = Outcomes()
        self.stopping = False

    async def ask(self, adapter: str) -> None:
        request = inference_pb2.ClassifyRequest(adapter=adapter, inputs=[inference_pb2.TextInput(text="a text")])
        await self._stub.Classify(request, metadata=(("x-adapter", adapter),), timeout=30)

    async def ask_all(self) -> None:
        for _ in range(ROUNDS):
            for adapter in self._adapters:
                await self.ask(adapter)

    async def load_all(self) -> None:
        await asyncio.gather(*(self.load(adapter) for adapter in self._adapters))

    async def load(self, adapter: str) -> None:
        """One call after the other, until told to stop; the last one is answered or failed twice."""
        has_failed = False
        while not self.stopping or has_failed:
            try:
                await self.ask(adapter)
                self.outcomes.answered[adapter] += 1
                has_failed = False
            except aio.AioRpcError as error:
                self.outcomes.failed.setdefault(adapter, []).append(error.code().name)
                if has_failed:
                    self.outcomes.num_failed_again += 1
                    return
                has_failed = True
                await asyncio.sleep(_BACKOFF_S)


async def line_from_stdin() -> None:
    await asyncio.to_thread(sys.stdin.readline)


async def main(target: str, config: str, adapters: list[str]) -> None:
    plain = json.dumps({name: value for name, value in json.loads(config).items() if name != "methodConfig"})
    async with (
        aio.insecure_channel(target, options=[("grpc.service_config", plain)]) as once,
        aio.insecure_channel(target, options=[("grpc.service_config", config)]) as again,
    ):
        clients = {"plain": Client(once, adapters), "retrying": Client(again, adapters)}
        for client in clients.values():
            await client.ask_all()
        print("asked", flush=True)
        await line_from_stdin()
        loads = [asyncio.create_task(client.load_all()) for client in clients.values()]
        await line_from_stdin()
        for client in clients.values():
            client.stopping = True
        await asyncio.gather(*loads)
        print(json.dumps({name: vars(client.outcomes) for name, client in clients.items()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
