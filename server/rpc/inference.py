"""InferenceService: the RPCs, each a `Call` on the one path of `server/rpc/path.py`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from server.deltas import Piece
from server.pb.multilora.v1 import inference_pb2, inference_pb2_grpc
from server.rpc.answer_question import ANSWER_QUESTION
from server.rpc.classify import CLASSIFY
from server.rpc.classify_tokens import CLASSIFY_TOKENS
from server.rpc.context import Context
from server.rpc.embed import EMBED
from server.rpc.generate import GENERATE, GENERATE_STREAM, part_message
from server.rpc.path import InferencePath
from server.rpc.translate import TRANSLATE

GENERATE_STREAM_METHOD = f"{inference_pb2.DESCRIPTOR.services_by_name['InferenceService'].full_name}/GenerateStream"


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Requests in, replies out; the work is done elsewhere."""

    def __init__(self, path: InferencePath) -> None:
        self._path = path

    async def Classify(  # noqa: N802 - the proto's name
        self, request: inference_pb2.ClassifyRequest, context: Context
    ) -> inference_pb2.ClassifyResponse:
        return await self._path.answer(CLASSIFY, request, context)

    async def ClassifyTokens(  # noqa: N802
        self, request: inference_pb2.ClassifyTokensRequest, context: Context
    ) -> inference_pb2.ClassifyTokensResponse:
        return await self._path.answer(CLASSIFY_TOKENS, request, context)

    async def AnswerQuestion(  # noqa: N802
        self, request: inference_pb2.AnswerQuestionRequest, context: Context
    ) -> inference_pb2.AnswerQuestionResponse:
        return await self._path.answer(ANSWER_QUESTION, request, context)

    async def Embed(  # noqa: N802
        self, request: inference_pb2.EmbedRequest, context: Context
    ) -> inference_pb2.EmbedResponse:
        return await self._path.answer(EMBED, request, context)

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        return await self._path.answer(GENERATE, request, context)

    async def GenerateStream(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse]:
        async with aclosing(self._path.stream(GENERATE_STREAM, request, context)) as parts:
            async for part in parts:
                if not isinstance(part, Piece):
                    yield inference_pb2.GenerateStreamResponse(end=part)
                elif message := part_message(request, part):
                    yield message

    async def Translate(  # noqa: N802
        self, request: inference_pb2.TranslateRequest, context: Context
    ) -> inference_pb2.TranslateResponse:
        return await self._path.answer(TRANSLATE, request, context)
