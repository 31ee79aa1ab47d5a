"""InferenceService: validate, admit, tokenise, submit, reply."""

from __future__ import annotations

import asyncio
import time
import uuid

from lora_runtime.errors import AdapterFailed, InvalidRequest
from lora_runtime.types import AdapterCard, AdapterInfo, AdapterRef, Request, Result, Task
from server.admission import Admission
from server.backend import BackendSlot, Engine, completion
from server.metrics import ServerMetrics
from server.pb.multilora.v1 import inference_pb2, inference_pb2_grpc
from server.rpc.context import Context, remaining_seconds
from server.rpc.messages import classify_response
from server.tokenize import TokenizerPool


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Requests in, replies out; the work is done elsewhere."""

    def __init__(
        self,
        slot: BackendSlot,
        admission: Admission,
        tokenizers: TokenizerPool,
        metrics: ServerMetrics,
        *,
        max_inputs: int,
    ) -> None:
        self._slot = slot
        self._admission = admission
        self._tokenizers = tokenizers
        self._metrics = metrics
        self._max_inputs = max_inputs

    async def Classify(  # noqa: N802 - the proto's name
        self, request: inference_pb2.ClassifyRequest, context: Context
    ) -> inference_pb2.ClassifyResponse:
        arrived = time.perf_counter()
        backend = self._slot.get()
        ref = self._validate(request)
        info = backend.engine.catalogue.resolve(ref)
        card = _card_of(info)
        with self._admission.permits(len(request.inputs)):
            started = time.perf_counter()
            sequences = await self._tokenizers.encode(
                backend.encoder, _texts(request), max_length=card.max_length, truncate=request.truncate
            )
            tokenize_s = time.perf_counter() - started
            self._metrics.observe_stage("tokenize", tokenize_s)
            work = Request(uuid.uuid4().hex, info.id, Task.CLASSIFY, sequences, _deadline_monotonic(context))
            result = await _answer(backend.engine, work)
        return classify_response(
            result,
            sequences,
            request,
            tokenize_seconds=tokenize_s,
            total_seconds=time.perf_counter() - arrived,
        )

    def _validate(self, request: inference_pb2.ClassifyRequest) -> AdapterRef:
        if not request.adapter:
            raise InvalidRequest("adapter", "is empty; name the adapter that answers")
        ref = AdapterRef.parse(request.adapter)
        if not request.inputs:
            raise InvalidRequest("inputs", "is empty; send at least one text")
        if len(request.inputs) > self._max_inputs:
            raise InvalidRequest(
                "inputs",
                f"has {len(request.inputs)} texts, the limit is {self._max_inputs}; send several requests",
                limit=self._max_inputs,
            )
        if request.HasField("top_k") and request.top_k < 1:
            raise InvalidRequest("top_k", f"{request.top_k} is less than 1; leave it unset to get every label")
        return ref


async def _answer(engine: Engine, work: Request) -> Result:
    try:
        return await completion(engine.submit(work))
    except asyncio.CancelledError:
        # nobody waits any more: the engine drops the request when it forms its next batch
        engine.cancel(work.request_id)
        raise


def _card_of(info: AdapterInfo) -> AdapterCard:
    """What tokenising needs to know; an adapter whose JSON files were refused has no card."""
    if info.card is None:
        assert info.failure is not None, f"{info.id} has neither a card nor a failure"
        raise AdapterFailed(str(info.id), info.failure)
    return info.card


def _texts(request: inference_pb2.ClassifyRequest) -> list[tuple[str, str | None]]:
    return [(item.text, item.text_pair if item.HasField("text_pair") else None) for item in request.inputs]


def _deadline_monotonic(context: Context) -> float | None:
    remaining_s = remaining_seconds(context)
    return None if remaining_s is None else time.monotonic() + remaining_s
