"""One ModelInfer request: translated, answered on the path of every inference RPC, translated back."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from lora_runtime.types import AdapterCard, AdapterInfo, Result, Task
from server.backend import BackendSlot
from server.deltas import Piece
from server.pb.multilora.v1 import common_pb2, inference_pb2
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.call import Call, CallRequest, Prepared, Target
from server.rpc.caller import require
from server.rpc.context import Context
from server.rpc.generate import GENERATE_STREAM
from server.rpc.open_inference.dialect import Dialect, fields_in
from server.rpc.open_inference.dialects import dialect_for
from server.rpc.open_inference.generate import TEXT, ends
from server.rpc.open_inference.naming import fields_renamed, model_name, reference_of
from server.rpc.open_inference.parameters import set_fields
from server.rpc.open_inference.selecting import Selected, select
from server.rpc.open_inference.tensors import Tensor, output_messages, read_texts
from server.rpc.path import InferencePath, described
from server.tenancy.model import Role

FINAL = "triton_final_response"


@dataclass(slots=True)
class Encoded:
    """A reply as tensors; the path fills in the rest."""

    outputs: list[pb.ModelInferResponse.InferOutputTensor]
    raw: list[bytes]
    adapter: str = ""
    version: int = 0
    digest: str = ""
    timings: common_pb2.Timings = field(default_factory=common_pb2.Timings)


@dataclass(frozen=True, slots=True)
class Question:
    """A request of ours, and what is wanted of its reply."""

    dialect: Dialect[Any, Any]
    request: Any
    model_name: str
    selected: tuple[Selected, ...]

    @property
    def call(self) -> Call[Any, Encoded]:
        """The dialect's, whose reply becomes tensors in the same thread."""
        return replace(self.dialect.call, prepare=self._prepare)

    def _prepare(self, request: CallRequest, target: Target) -> Prepared[Encoded]:
        prepared = self.dialect.call.prepare(request, target)

        def interpret(result: Result) -> Encoded:
            tensors = self.dialect.tensors(request, prepared.interpret(result))
            labels = result.card.labels or ()
            return Encoded(*output_messages((wanted.name, wanted.of(tensors, labels)) for wanted in self.selected))

        return replace(prepared, interpret=interpret)


class Inferring:
    """Belongs to the asyncio loop."""

    def __init__(self, path: InferencePath, slot: BackendSlot, max_inputs: int) -> None:
        self._path = path
        self._slot = slot
        self._max_inputs = max_inputs

    async def answer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """One response; raises as the path, with fields by the protocol's names."""
        question = await self._question(request)
        return await self._answered(request, question, context)

    async def stream(self, request: pb.ModelInferRequest, context: Context) -> AsyncGenerator[pb.ModelInferResponse]:
        """As `answer`; what generates answers in pieces. The last one has the parameter FINAL, and it is true."""
        question = await self._question(request)
        if not question.dialect.is_decoupled:
            yield _final(await self._answered(request, question, context))
            return
        wants_text = any(wanted.name == TEXT for wanted in question.selected)
        asked: inference_pb2.GenerateRequest = question.request
        with fields_renamed():
            async with aclosing(self._path.stream(GENERATE_STREAM, asked, context)) as parts:
                async for part in parts:
                    if not isinstance(part, Piece):
                        yield _end(request, question, part)
                    elif part.text and wants_text:
                        yield _delta(request, question, part)

    async def _answered(
        self, request: pb.ModelInferRequest, question: Question, context: Context
    ) -> pb.ModelInferResponse:
        with fields_renamed():
            return _response(request, question, await self._path.answer(question.call, question.request, context))

    async def _question(self, request: pb.ModelInferRequest) -> Question:
        """What is asked of whom. Nothing is spent on it but reading it, and the adapter's files where it is unknown."""
        engine = self._slot.get().engine
        require(Role.INFER)
        reference = reference_of(request.model_name, request.model_version)
        texts = read_texts(request, self._max_inputs)
        # drawn here for a weighted alias, so that the same version is described and asked
        key = request.parameters["routing_key"].string_param if "routing_key" in request.parameters else ""
        key = key or uuid.uuid4().hex
        with fields_renamed():
            info = await described(engine, reference, key)
        card = card_of(info)
        dialect = dialect_for(card, (output.name for output in request.outputs))
        asked = dialect.build(texts, card)
        asked.adapter = reference
        set_fields(request.parameters, {**dialect.targets(asked), **fields_in(asked, "priority", "routing_key")})
        asked.routing_key = asked.routing_key or key
        return Question(dialect, asked, model_name(info.id), select(request, dialect, card))


def card_of(info: AdapterInfo) -> AdapterCard:
    """Raises AdapterFailed where its files were refused."""
    return info.card_for(info.card.task if info.card is not None else Task.CLASSIFY)


def _response(request: pb.ModelInferRequest, question: Question, reply: Encoded) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(
        model_name=question.model_name,
        model_version=str(reply.version),
        id=request.id,
        outputs=reply.outputs,
        raw_output_contents=reply.raw,
    )


def _delta(request: pb.ModelInferRequest, question: Question, piece: Piece) -> pb.ModelInferResponse:
    response = _tensors_response(request, question, {TEXT: Tensor("BYTES", [[piece.text]])})
    response.parameters["sample"].int64_param = piece.sample
    response.parameters[FINAL].bool_param = False
    return response


def _end(
    request: pb.ModelInferRequest, question: Question, end: inference_pb2.GenerateStreamEnd
) -> pb.ModelInferResponse:
    known = {TEXT: Tensor("BYTES", [[""] * len(end.samples)]), **ends([end.samples])}
    wanted = {output.name: known[output.name] for output in question.selected}
    response = _tensors_response(request, question, wanted)
    response.model_version = str(end.version)
    return _final(response)


def _tensors_response(
    request: pb.ModelInferRequest, question: Question, tensors: dict[str, Tensor]
) -> pb.ModelInferResponse:
    outputs, raw = output_messages(tensors.items())
    return pb.ModelInferResponse(
        model_name=question.model_name, id=request.id, outputs=outputs, raw_output_contents=raw
    )


def _final(response: pb.ModelInferResponse) -> pb.ModelInferResponse:
    response.parameters[FINAL].bool_param = True
    return response
