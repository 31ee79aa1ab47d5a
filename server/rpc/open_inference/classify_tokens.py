"""CLASSIFY_TOKENS: texts to rows of labelled tokens, words or entities."""

from __future__ import annotations

from lora_runtime.types import AdapterCard, Task
from server.pb.multilora.v1 import inference_pb2
from server.rpc.classify_tokens import CLASSIFY_TOKENS
from server.rpc.open_inference.dialect import (
    Dialect,
    OutputSpec,
    Texts,
    check_inputs,
    fields_in,
    single_text,
    text_inputs,
)
from server.rpc.open_inference.tensors import Tensor, padded, padded_numbers


def _outputs(_card: AdapterCard) -> tuple[OutputSpec, ...]:
    return (
        OutputSpec("label", "BYTES"),
        OutputSpec("text", "BYTES"),
        OutputSpec("score", "FP32"),
        OutputSpec("start", "INT32"),
        OutputSpec("end", "INT32"),
        OutputSpec("count", "INT32", 1),
    )


def _build(texts: Texts, card: AdapterCard) -> inference_pb2.ClassifyTokensRequest:
    check_inputs(texts, single_text(card))
    return inference_pb2.ClassifyTokensRequest(inputs=text_inputs(texts))


def _tensors(
    _request: inference_pb2.ClassifyTokensRequest, reply: inference_pb2.ClassifyTokensResponse
) -> dict[str, Tensor]:
    rows = [result.spans for result in reply.results]
    return {
        "label": padded([[span.label for span in row] for row in rows]),
        "text": padded([[span.text for span in row] for row in rows]),
        "score": padded_numbers([[span.score for span in row] for row in rows], "FP32"),
        "start": padded_numbers([[span.start for span in row] for row in rows], "INT32"),
        "end": padded_numbers([[span.end for span in row] for row in rows], "INT32"),
        "count": Tensor("INT32", [[len(row)] for row in rows]),
    }


TOKEN_CLASSES = Dialect(
    Task.CLASSIFY_TOKENS,
    CLASSIFY_TOKENS,
    single_text,
    _outputs,
    _build,
    lambda request: fields_in(request, "unit", "subword_strategy", "truncate"),
    _tensors,
)
