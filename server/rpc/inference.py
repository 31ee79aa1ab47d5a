"""InferenceService: one path for every task. Resolve, check, admit, tokenise, submit, interpret, reply.

What differs between tasks is in `classify.py`, `classify_tokens.py`, `answer_question.py` and `embed.py`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from lora_runtime import types
from lora_runtime.errors import AdapterNotFound, InvalidRequest
from lora_runtime.types import AdapterInfo, AdapterState, Request, Result, Task
from server.admission import Admission, Permits
from server.backend import BackendSlot, Engine, completion
from server.metrics import ServerMetrics
from server.pb.multilora.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server.rpc.answer_question import ANSWER_QUESTION
from server.rpc.call import Call, CallRequest, Prepared, ReplyT, RequestT
from server.rpc.caller import caller, require, resolve
from server.rpc.classify import CLASSIFY
from server.rpc.classify_tokens import CLASSIFY_TOKENS
from server.rpc.context import Context, remaining_seconds
from server.rpc.embed import EMBED
from server.tenancy.limits import TenantLimits, TenantPermit, estimate_tokens
from server.tenancy.model import Role
from server.tokenize import TokenizerPool

T = TypeVar("T")

_MAX_ROUTING_KEY = 256
MAX_PRIORITY = 3


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Requests in, replies out; the work is done elsewhere."""

    def __init__(
        self,
        slot: BackendSlot,
        admission: Admission,
        limits: TenantLimits,
        tokenizers: TokenizerPool,
        metrics: ServerMetrics,
        *,
        max_inputs: int,
        max_input_chars: int,
    ) -> None:
        self._slot = slot
        self._admission = admission
        self._limits = limits
        self._tokenizers = tokenizers
        self._metrics = metrics
        self._max_inputs = max_inputs
        self._max_input_chars = max_input_chars

    async def Classify(  # noqa: N802 - the proto's name
        self, request: inference_pb2.ClassifyRequest, context: Context
    ) -> inference_pb2.ClassifyResponse:
        return await self._serve(CLASSIFY, request, context)

    async def ClassifyTokens(  # noqa: N802
        self, request: inference_pb2.ClassifyTokensRequest, context: Context
    ) -> inference_pb2.ClassifyTokensResponse:
        return await self._serve(CLASSIFY_TOKENS, request, context)

    async def AnswerQuestion(  # noqa: N802
        self, request: inference_pb2.AnswerQuestionRequest, context: Context
    ) -> inference_pb2.AnswerQuestionResponse:
        return await self._serve(ANSWER_QUESTION, request, context)

    async def Embed(  # noqa: N802
        self, request: inference_pb2.EmbedRequest, context: Context
    ) -> inference_pb2.EmbedResponse:
        return await self._serve(EMBED, request, context)

    async def _serve(self, call: Call[RequestT, ReplyT], request: RequestT, context: Context) -> ReplyT:
        """Answer a request of any task; permits are held from here until the reply is complete."""
        arrived = time.perf_counter()
        backend = self._slot.get()
        tenant = require(Role.INFER).tenant
        _check_routing(request)
        catalogue = backend.engine.catalogue
        info = resolve(catalogue, request.adapter, request.routing_key)
        self._check_inputs(request)
        call.check(request)
        if info.card is not None:
            info.card_for(call.task)  # refused before anything is spent on it
        with (
            self._limits.admit(tenant, len(request.inputs), _estimated_tokens(request)) as charge,
            self._admission.permits(len(request.inputs), remaining_seconds(context), tenant) as permits,
        ):
            held = charge, permits
            try:
                prepared, tokenize_s, result = await self._run(call, request, context, info, held)
            except AdapterNotFound:  # deleted meanwhile; its alias had moved on before that, or this raises again
                info = resolve(catalogue, request.adapter, request.routing_key)
                prepared, tokenize_s, result = await self._run(call, request, context, info, held)
            reply, interpret_s = await self._in_pool("interpret", lambda: prepared.interpret(result))
        reply.adapter = result.adapter.resource_name
        reply.version = result.adapter.version
        reply.digest = result.digest
        reply.timings.CopyFrom(_timings(result.timings, tokenize_s, interpret_s, total_s=time.perf_counter() - arrived))
        return reply

    async def _run(
        self,
        call: Call[RequestT, ReplyT],
        request: RequestT,
        context: Context,
        info: AdapterInfo,
        held: tuple[TenantPermit, Permits],
    ) -> tuple[Prepared[ReplyT], float, Result]:
        """Tokenise for one adapter version and have it answer; also the seconds that tokenising took."""
        backend, (charge, permits) = self._slot.get(), held
        info = await _fetched(backend.engine, info)
        card = info.card_for(call.task)
        prepared, tokenize_s = await self._in_pool(
            "tokenize", lambda: call.prepare(request, backend.encoder_for(info), card)
        )
        num_sequences = len(prepared.sequences)
        charge.settle_tokens(sum(sequence.num_tokens for sequence in prepared.sequences))
        self._admit_windows(permits, num_sequences)
        charge.grow_to(num_sequences)
        work = _engine_request(call.task, info, prepared, context, request.priority)
        return prepared, tokenize_s, await _answer(backend.engine, work)

    def _check_inputs(self, request: CallRequest) -> None:
        num_inputs = len(request.inputs)
        if num_inputs == 0:
            raise InvalidRequest("inputs", "is empty; send at least one text")
        if num_inputs > self._max_inputs:
            raise InvalidRequest(
                "inputs",
                f"has {num_inputs} entries, the limit is {self._max_inputs}; send several requests",
                limit=self._max_inputs,
            )
        for index, item in enumerate(request.inputs):
            for field, value in item.ListFields():
                if isinstance(value, str) and len(value) > self._max_input_chars:
                    raise self._too_many_chars(f"inputs[{index}].{field.name}", len(value))

    def _too_many_chars(self, field: str, num_chars: int) -> InvalidRequest:
        limit = self._max_input_chars
        return InvalidRequest(field, f"has {num_chars} characters, the limit is {limit}; send it in parts", limit=limit)

    def _admit_windows(self, permits: Permits, num_sequences: int) -> None:
        """Take permits for the windows of long texts, which are known only now."""
        if num_sequences > self._admission.max_sequences:
            raise InvalidRequest(
                "inputs",
                f"are {num_sequences} sequences with all windows, the server holds {self._admission.max_sequences}; "
                "send fewer of them at once, or shorter contexts",
                limit=self._admission.max_sequences,
            )
        permits.grow_to(num_sequences)

    async def _in_pool(self, stage: str, work: Callable[[], T]) -> tuple[T, float]:
        """The result of `work` in a tokeniser thread, and the seconds that took, the wait for a thread included."""
        started = time.perf_counter()
        done = await self._tokenizers.run(work)
        seconds = time.perf_counter() - started
        self._metrics.observe_stage(stage, seconds)
        return done, seconds


def _check_routing(request: CallRequest) -> None:
    if len(request.routing_key) > _MAX_ROUTING_KEY:
        length = len(request.routing_key)
        raise InvalidRequest("routing_key", f"has {length} characters, the limit is {_MAX_ROUTING_KEY}")
    if not 0 <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"{request.priority} is not between 0 and {MAX_PRIORITY}")


def _estimated_tokens(request: CallRequest) -> int:
    return sum(estimate_tokens(item.ByteSize()) for item in request.inputs)


async def _fetched(engine: Engine, info: AdapterInfo) -> AdapterInfo:
    """Start the load of a cold adapter while its texts are tokenised; wait only for what tokenising needs of it.

    That is its card, and its files where it has a tokenizer of its own.
    """
    if info.state is AdapterState.READY:
        return info
    fetching = engine.prefetch(info.id)
    if info.card is None or (info.path is None and info.card.tokenizer_sha256 is not None):
        return await completion(fetching)
    return info


async def _answer(engine: Engine, work: Request) -> Result:
    try:
        return await completion(engine.submit(work))
    except asyncio.CancelledError:
        # nobody waits any more: the engine drops the request when it forms its next batch
        engine.cancel(work.request_id)
        raise


def _engine_request(
    task: Task, info: AdapterInfo, prepared: Prepared[ReplyT], context: Context, priority: int
) -> Request:
    remaining_s = remaining_seconds(context)
    return Request(
        request_id=uuid.uuid4().hex,
        adapter=info.id,
        task=task,
        sequences=prepared.sequences,
        deadline_monotonic=None if remaining_s is None else time.monotonic() + remaining_s,
        pooling=prepared.pooling,
        input_of=prepared.input_of,
        tenant=caller().tenant,
        priority=priority,
    )


def _timings(engine: types.Timings, tokenize_s: float, interpret_s: float, *, total_s: float) -> common_pb2.Timings:
    return common_pb2.Timings(
        queue_seconds=engine.queue_s,
        tokenize_seconds=tokenize_s,
        load_wait_seconds=engine.load_wait_s,
        forward_seconds=engine.forward_s,
        interpret_seconds=interpret_s,
        total_seconds=total_s,
    )
