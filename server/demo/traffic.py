"""The demo's client: loads adapters into the running server, classifies, and sends a mixed stream."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from server.pb.multilora.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

CLIENTS_PER_ADAPTER = 4
LIST_SIZE = 32


@dataclass(frozen=True, slots=True)
class Stream:
    """What a mixed stream measured."""

    answered: dict[str, int]  # requests by adapter
    wrong: int  # answers that differ from the adapter's answer when asked alone
    seconds: float
    adapters_per_batch: float


async def load_adapter(target: str, name: str) -> float:
    """Register `name` (a folder under the server's adapter root) and load it; the server's seconds for the load."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub: adapters_pb2_grpc.AdapterServiceAsyncStub = adapters_pb2_grpc.AdapterServiceStub(channel)
        registered = await stub.RegisterAdapter(adapters_pb2.RegisterAdapterRequest(name=name, source=name))
        request = adapters_pb2.LoadAdapterRequest(adapter=registered.adapter.name, wait=True)
        return (await stub.LoadAdapter(request)).adapter.load_seconds


async def classify(target: str, name: str, texts: Sequence[str]) -> list[str]:
    """The best label of each text, in lists of 32."""
    answers: list[str] = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for start in range(0, len(texts), LIST_SIZE):
            inputs = [inference_pb2.TextInput(text=text) for text in texts[start : start + LIST_SIZE]]
            request = inference_pb2.ClassifyRequest(adapter=name, inputs=inputs, top_k=1, truncate=True)
            reply = await stub.Classify(request)
            answers += [result.scores[0].label for result in reply.results]
    return answers


async def mixed_stream(target: str, metrics_url: str, work: dict[str, list[tuple[str, str]]], seconds: float) -> Stream:
    """Clients of all adapters at once, a text per request; `work` has (text, answer when asked alone) by adapter."""
    before = _batches(metrics_url)
    started = time.monotonic()
    answered, wrong = dict.fromkeys(work, 0), 0

    async def client(stub: inference_pb2_grpc.InferenceServiceAsyncStub, name: str, start: int) -> None:
        nonlocal wrong
        i = start
        while time.monotonic() - started < seconds:
            text, alone = work[name][i % len(work[name])]
            inputs = [inference_pb2.TextInput(text=text)]
            request = inference_pb2.ClassifyRequest(adapter=name, inputs=inputs, top_k=1, truncate=True)
            reply = await stub.Classify(request)
            wrong += reply.results[0].scores[0].label != alone
            answered[name] += 1
            i += CLIENTS_PER_ADAPTER

    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        clients = [client(stub, name, start) for name in work for start in range(CLIENTS_PER_ADAPTER)]
        await asyncio.gather(*clients)
    elapsed = time.monotonic() - started
    after = _batches(metrics_url)
    count = after[1] - before[1]
    return Stream(answered, wrong, elapsed, (after[0] - before[0]) / count if count else 0.0)


def _batches(metrics_url: str) -> tuple[float, float]:
    """(sum of distinct adapters, number of batches) so far, from the server's own metrics."""
    with urllib.request.urlopen(metrics_url, timeout=5) as page:
        text = page.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = sample.value
    name = "multilora_batch_adapters"
    return found[f"{name}_sum"], found[f"{name}_count"]
