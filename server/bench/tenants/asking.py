"""Tenants' calls: each with its key, each answer checked, each outcome kept."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import cast

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from server.bench.adapters.clients import CALL_TIMEOUT_S, Client, connect
from server.bench.adapters.plan import TOLERANCE
from server.bench.adapters.reference import Reference
from server.bench.measure import OutputsDiffer
from server.bench.tenants.plan import ADAPTER, TENANTS
from server.bench.tenants.site import Site
from server.pb.multilora.v1 import inference_pb2

OK = "OK"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call; times by `perf_counter`."""

    code: str  # OK, the reason that the server gave, or else the status code
    due: float  # when it was to be sent
    sent: float
    ended: float
    num_texts: int
    num_tokens: int = 0  # of an answer

    @property
    def seconds(self) -> float:
        """From when it was due: a client that is late does not hide a wait."""
        return self.ended - self.due


class Tenant:
    """One tenant as a client."""

    def __init__(self, name: str, site: Site, reference: Reference, client: Client) -> None:
        self.name = name
        self._file = TENANTS.index(name)
        self._reference = reference
        self._client = client
        self._metadata = (("authorization", f"Bearer {site.keys[name]}"),)

    def begin(
        self, texts: Sequence[int], timeout_s: float = CALL_TIMEOUT_S
    ) -> aio.UnaryUnaryCall[inference_pb2.ClassifyRequest, inference_pb2.ClassifyResponse]:
        inputs = [inference_pb2.TextInput(text=self._reference.texts[text]) for text in texts]
        request = inference_pb2.ClassifyRequest(adapter=ADAPTER, inputs=inputs, return_logits=True)
        return self._client.inference.Classify(request, timeout=timeout_s, metadata=self._metadata)

    async def ask(self, texts: Sequence[int], timeout_s: float = CALL_TIMEOUT_S, due: float | None = None) -> Outcome:
        sent = time.perf_counter()
        due = sent if due is None else due
        try:
            reply = await self.begin(texts, timeout_s)
        except aio.AioRpcError as error:
            return Outcome(reason_of(error), due, sent, time.perf_counter(), len(texts))
        ended = time.perf_counter()
        self.check(texts, reply)
        return Outcome(OK, due, sent, ended, len(texts), sum(result.num_tokens for result in reply.results))

    def check(self, texts: Sequence[int], reply: inference_pb2.ClassifyResponse) -> None:
        """Raises OutputsDiffer: no figure is worth having then."""
        reference = self._reference
        found = np.asarray([result.logits for result in reply.results], np.float32)
        wanted = reference.logits[self._file, list(texts)]
        error = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
        reference.num_checked += 1
        reference.largest_error = max(reference.largest_error, error)
        if not error <= TOLERANCE:
            message = f"{self.name} was answered with an error of {error:.1e} (limit {TOLERANCE})"
            raise OutputsDiffer(f"{message}; nothing is reported")


@asynccontextmanager
async def tenants(
    names: Iterable[str], target: str, site: Site, reference: Reference
) -> AsyncGenerator[dict[str, Tenant]]:
    """Each with a connection of its own."""
    async with AsyncExitStack() as stack:
        yield {name: Tenant(name, site, reference, await stack.enter_async_context(connect(target))) for name in names}


def reason_of(error: grpc.RpcError) -> str:
    """The `reason` of the error's ErrorInfo, or its status code."""
    failed = cast("aio.AioRpcError", error)
    for key, value in failed.trailing_metadata():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            if any(detail.Unpack(info) for detail in status_pb2.Status.FromString(cast("bytes", value)).details):
                return info.reason
    return failed.code().name


class Texts:
    """Random ones, the same in every run."""

    def __init__(self, seed: int, count: int) -> None:
        self._chance = random.Random(seed)
        self._count = count

    def some(self, count: int) -> list[int]:
        return [self._chance.randrange(self._count) for _ in range(count)]

    def arrivals(self, rate: float, start: float, end: float) -> list[float]:
        """A Poisson process; at least one call in a hundred seconds, however slow the server seemed."""
        rate = max(rate, 0.01)
        times: list[float] = []
        now = start + self._chance.expovariate(rate)
        while now < end:
            times.append(now)
            now += self._chance.expovariate(rate)
        return times


async def open_loop(
    tenant: Tenant,
    arrivals: Sequence[float],
    texts: Texts,
    outcomes: list[Outcome],
    size: int = 1,
    timeout_s: float = CALL_TIMEOUT_S,
) -> None:
    """Calls at given times, whether those before are answered or not. Cancelled, it cancels what is in flight."""

    async def one(due: float) -> None:
        outcomes.append(await tenant.ask(texts.some(size), timeout_s, due))

    async with asyncio.TaskGroup() as group:
        for due in arrivals:
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            group.create_task(one(due))


async def closed_loop(tenant: Tenant, count: int, until: float, texts: Texts, size: int = 1) -> list[Outcome]:
    """Keep `count` calls in flight until then."""
    outcomes: list[Outcome] = []

    async def one() -> None:
        while time.perf_counter() < until:
            outcomes.append(await tenant.ask(texts.some(size)))

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
    return outcomes


async def busy(
    callers: Iterable[Tenant], in_flight: int, start: float, end: float, texts: Texts, size: int = 1
) -> tuple[float, list[Outcome]]:
    """Texts answered per second from `start` to `end` by a server that always has `in_flight` of them."""
    callers = list(callers)
    each = max(1, in_flight // size // len(callers))
    found = await asyncio.gather(*(closed_loop(tenant, each, end, texts, size) for tenant in callers))
    outcomes = [outcome for outcomes in found for outcome in outcomes]
    return texts_per_s(outcomes, start, end), outcomes


def texts_per_s(outcomes: Iterable[Outcome], start: float, end: float) -> float:
    answered = sum(outcome.num_texts for outcome in outcomes if outcome.code == OK and start <= outcome.ended < end)
    return answered / (end - start)
