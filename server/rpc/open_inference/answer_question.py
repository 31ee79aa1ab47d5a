"""ANSWER: questions and contexts to rows of spans."""

from __future__ import annotations

from dataclasses import replace

from lora_runtime.types import AdapterCard, Task
from server.pb.multilora.v1 import inference_pb2
from server.rpc.answer_question import ANSWER_QUESTION
from server.rpc.open_inference.dialect import Dialect, InputSpec, OutputSpec, Texts, check_inputs, fields_in
from server.rpc.open_inference.tensors import Tensor, padded, padded_numbers

_SETTINGS = ("top_k", "max_answer_tokens", "allow_no_answer", "no_answer_threshold", "doc_stride")


def _inputs(_card: AdapterCard) -> tuple[InputSpec, ...]:
    return InputSpec("question"), InputSpec("context")


def _outputs(_card: AdapterCard) -> tuple[OutputSpec, ...]:
    return (
        OutputSpec("answer", "BYTES"),
        OutputSpec("score", "FP32"),
        OutputSpec("start", "INT32"),
        OutputSpec("end", "INT32"),
    )


def _build(texts: Texts, card: AdapterCard) -> inference_pb2.AnswerQuestionRequest:
    check_inputs(texts, _inputs(card))
    pairs = zip(texts["question"], texts["context"], strict=True)
    inputs = [inference_pb2.QuestionInput(question=question, context=context) for question, context in pairs]
    return inference_pb2.AnswerQuestionRequest(inputs=inputs)


def _tensors(
    _request: inference_pb2.AnswerQuestionRequest, reply: inference_pb2.AnswerQuestionResponse
) -> dict[str, Tensor]:
    rows = [result.answers for result in reply.results]
    return {
        "answer": padded([[answer.text for answer in row] for row in rows]),
        "score": padded_numbers([[answer.score for answer in row] for row in rows], "FP32"),
        "start": padded_numbers([[answer.start for answer in row] for row in rows], "INT32"),
        "end": padded_numbers([[answer.end for answer in row] for row in rows], "INT32"),
    }


ANSWERS = Dialect(
    Task.ANSWER,
    replace(ANSWER_QUESTION, otherwise=None),  # what generates its answers is a model of another dialect
    _inputs,
    _outputs,
    _build,
    lambda request: fields_in(request, *_SETTINGS),
    _tensors,
)
