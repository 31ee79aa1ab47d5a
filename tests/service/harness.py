"""A server in this process, and the clients to talk to it."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lora_runtime.adapters.sources.fetch import Fetcher
from server.app import App
from server.backend import Backend
from server.pb.multilora.v1 import adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.settings import ServeSettings
from server.startup import BackendFactory, load_runtime
from tests.service.fake_runtime import FakeEngine, FakeRuntime

HealthStatus = health_pb2.HealthCheckResponse


@dataclass
class Harness:
    """One running server with its clients; `engine` is the fake behind it."""

    app: App
    channel: aio.Channel
    inference: Any
    adapters: Any
    stop: asyncio.Event
    announced: list[str]
    runtime: FakeRuntime | None

    @property
    def engine(self) -> FakeEngine:
        assert self.runtime is not None
        return self.runtime.engine

    async def health(self, service: str = "") -> int:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    async def until_health(self, wanted: int) -> None:
        async with asyncio.timeout(60):
            while await self.health() != wanted:
                await asyncio.sleep(0.01)

    async def metrics(self) -> str:
        url = f"http://127.0.0.1:{self.app.metrics_port}/metrics"

        def fetch() -> str:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.read().decode()

        return await asyncio.to_thread(fetch)

    async def sample(self, series: str) -> float:
        """The value of one sample, such as `multilora_adapters{state="READY"}`."""
        for line in (await self.metrics()).splitlines():
            name, _, value = line.rpartition(" ")
            if name == series:
                return float(value)
        raise AssertionError(f"no sample {series}")

    async def until_sample(self, series: str, wanted: float) -> None:
        """Wait until a sample has that value: what a reply counts may come after the reply."""
        async with asyncio.timeout(30):
            while f"{series} {wanted}" not in (await self.metrics()).splitlines():
                await asyncio.sleep(0.01)

    async def until_admitted(self, num_sequences: int) -> None:
        """Wait until that many sequences are admitted."""
        async with asyncio.timeout(5):
            while await self.sample("multilora_admitted_sequences") != num_sequences:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    root: Path | str, *, hold_base: threading.Event | None = None, real: bool = False, **settings: Any
) -> AsyncGenerator[Harness]:
    """A server on free loopback ports; with `hold_base` its base loads only once that is set."""
    runtime = None if real else FakeRuntime()
    defaults: dict[str, Any] = {"base": "fake-base", "auth": "none", "port": 0, "metrics_port": 0, "grace": 5.0}
    given = {**defaults, "adapters": str(root), **settings}
    app = App(ServeSettings.model_validate(given), _factory(runtime, hold_base))
    stop, announced = asyncio.Event(), list[str]()
    life = asyncio.create_task(app.run(stop, announced.append))
    try:
        while app.port == 0 and not life.done():
            await asyncio.sleep(0.005)
        async with aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            inference = inference_pb2_grpc.InferenceServiceStub(channel)
            adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
            harness = Harness(app, channel, inference, adapters, stop, announced, runtime)
            if hold_base is None:
                while not announced and not life.done():
                    await asyncio.sleep(0.005)
            yield harness
    finally:
        stop.set()
        if hold_base is not None:
            hold_base.set()
        await life
        if runtime is not None and not runtime.closed:
            runtime.close()


def _factory(runtime: FakeRuntime | None, hold: threading.Event | None) -> BackendFactory:
    if runtime is None:
        return load_runtime

    def build(_settings: ServeSettings, _fetcher: Fetcher) -> Backend:
        if hold is not None:
            hold.wait()
        return runtime

    return build


def classify_request(adapter: str, *texts: str, **fields: Any) -> inference_pb2.ClassifyRequest:
    inputs = [inference_pb2.TextInput(text=text) for text in texts]
    return inference_pb2.ClassifyRequest(adapter=adapter, inputs=inputs, **fields)


def tokens_request(adapter: str, *texts: str, **fields: Any) -> inference_pb2.ClassifyTokensRequest:
    inputs = [inference_pb2.TextInput(text=text) for text in texts]
    return inference_pb2.ClassifyTokensRequest(adapter=adapter, inputs=inputs, **fields)


def question_request(adapter: str, *pairs: tuple[str, str], **fields: Any) -> inference_pb2.AnswerQuestionRequest:
    inputs = [inference_pb2.QuestionInput(question=question, context=context) for question, context in pairs]
    return inference_pb2.AnswerQuestionRequest(adapter=adapter, inputs=inputs, **fields)


def generate_request(adapter: str, *texts: str, **fields: Any) -> inference_pb2.GenerateRequest:
    inputs = [inference_pb2.PromptInput(text=text) for text in texts]
    return inference_pb2.GenerateRequest(adapter=adapter, inputs=inputs, **fields)


def translate_request(adapter: str, *texts: str, **fields: Any) -> inference_pb2.TranslateRequest:
    inputs = [inference_pb2.TextInput(text=text) for text in texts]
    return inference_pb2.TranslateRequest(adapter=adapter, inputs=inputs, **fields)


def embed_request(adapter: str, *texts: str, **fields: Any) -> inference_pb2.EmbedRequest:
    inputs = [inference_pb2.TextInput(text=text) for text in texts]
    return inference_pb2.EmbedRequest(adapter=adapter, inputs=inputs, **fields)


@dataclass(frozen=True)
class Failure:
    """An error as a client sees it."""

    code: grpc.StatusCode
    message: str
    info: error_details_pb2.ErrorInfo
    field: str | None
    retry_after_s: float | None
    request_id: str
    quota: tuple[str, str] | None  # whose, and which limit it was


async def failure_of(call: Any) -> Failure:
    """Await a call that must fail, and take its status apart."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    error = caught.value
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info, bad, retry, quota = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.QuotaFailure(),
    )
    for detail in status.details:
        for message in (info, bad, retry, quota):
            detail.Unpack(message)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return Failure(
        code=error.code(),
        message=error.details() or "",
        info=info,
        field=bad.field_violations[0].field if bad.field_violations else None,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
        request_id=trailers["x-request-id"],
        quota=(quota.violations[0].subject, quota.violations[0].description) if quota.violations else None,
    )
