"""AnswerQuestion: questions and contexts to spans of the contexts."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

from lora_runtime.answers.spans import Span, best_spans, supports_no_answer
from lora_runtime.errors import InvalidRequest
from lora_runtime.types import Result, SpanLogits, Task
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Call, Prepared, Target, outputs_of
from server.rpc.generated_answer import GENERATED_ANSWER

if TYPE_CHECKING:  # brings transformers
    from lora_runtime.model.encoder_text import Window

DEFAULT_TOP_K, MAX_TOP_K = 1, 100
DEFAULT_ANSWER_TOKENS, MAX_ANSWER_TOKENS = 30, 512


def _check(request: inference_pb2.AnswerQuestionRequest) -> None:
    if request.HasField("top_k") and not 1 <= request.top_k <= MAX_TOP_K:
        raise InvalidRequest("top_k", f"{request.top_k} is not between 1 and {MAX_TOP_K}")
    if request.HasField("max_answer_tokens") and not 1 <= request.max_answer_tokens <= MAX_ANSWER_TOKENS:
        raise InvalidRequest(
            "max_answer_tokens", f"{request.max_answer_tokens} is not between 1 and {MAX_ANSWER_TOKENS}"
        )
    if not math.isfinite(request.no_answer_threshold):
        raise InvalidRequest("no_answer_threshold", f"{request.no_answer_threshold} is not finite")
    if request.no_answer_threshold != 0 and not request.allow_no_answer:
        raise InvalidRequest("no_answer_threshold", "has no effect; set allow_no_answer too")
    if request.HasField("doc_stride") and request.doc_stride < 0:
        raise InvalidRequest("doc_stride", f"{request.doc_stride} is negative; leave it unset for the server's choice")


def _prepare(
    request: inference_pb2.AnswerQuestionRequest, target: Target
) -> Prepared[inference_pb2.AnswerQuestionResponse]:
    contexts = [item.context for item in request.inputs]
    pairs = [(item.question, context) for item, context in zip(request.inputs, contexts, strict=True)]
    stride = request.doc_stride if request.HasField("doc_stride") else None
    windows = target.encoder.encode_questions(pairs, max_length=target.card.max_length, doc_stride=stride)
    if request.allow_no_answer and not all(map(supports_no_answer, windows)):
        raise InvalidRequest(
            "allow_no_answer", "the tokenizer marks no token that could stand for no answer; leave it unset"
        )
    return Prepared(
        sequences=tuple(window.sequence for own in windows for window in own),
        interpret=lambda result: _response(request, contexts, windows, result),
        input_of=tuple(index for index, own in enumerate(windows) for _ in own),
    )


def _response(
    request: inference_pb2.AnswerQuestionRequest,
    contexts: list[str],
    windows: tuple[tuple[Window, ...], ...],
    result: Result,
) -> inference_pb2.AnswerQuestionResponse:
    logits = iter(outputs_of(result, SpanLogits))
    return inference_pb2.AnswerQuestionResponse(
        results=[
            _result(request, context, own, tuple(islice(logits, len(own))))
            for context, own in zip(contexts, windows, strict=True)
        ]
    )


def _result(
    request: inference_pb2.AnswerQuestionRequest,
    context: str,
    windows: tuple[Window, ...],
    logits: tuple[SpanLogits, ...],
) -> inference_pb2.AnswerQuestionResult:
    spans = best_spans(
        windows,
        logits,
        top_k=request.top_k if request.HasField("top_k") else DEFAULT_TOP_K,
        max_answer_tokens=request.max_answer_tokens or DEFAULT_ANSWER_TOKENS,  # 0 was refused where it was set
        allow_no_answer=request.allow_no_answer,
        no_answer_threshold=request.no_answer_threshold,
    )
    return inference_pb2.AnswerQuestionResult(
        answers=[_answer(context, span) for span in spans],
        num_tokens=sum(window.sequence.num_tokens for window in windows),
        num_windows=len(windows),
    )


def _answer(context: str, span: Span) -> inference_pb2.Answer:
    if span.is_null:
        return inference_pb2.Answer(no_answer=True, score=span.score, logit=span.logit)
    return inference_pb2.Answer(
        text=context[span.start : span.end], start=span.start, end=span.end, score=span.score, logit=span.logit
    )


ANSWER_QUESTION = Call(Task.ANSWER, _check, _prepare, otherwise=GENERATED_ANSWER)
