"""EMBED: texts to vectors."""

from __future__ import annotations

from lora_runtime.types import AdapterCard, Task
from server.pb.multilora.v1 import inference_pb2
from server.rpc.embed import EMBED
from server.rpc.open_inference.dialect import (
    Dialect,
    OutputSpec,
    Texts,
    check_inputs,
    fields_in,
    text_inputs,
    text_or_pair,
)
from server.rpc.open_inference.tensors import Tensor


def _outputs(_card: AdapterCard) -> tuple[OutputSpec, ...]:
    return (OutputSpec("embedding", "FP32"),)


def _build(texts: Texts, card: AdapterCard) -> inference_pb2.EmbedRequest:
    check_inputs(texts, text_or_pair(card))
    return inference_pb2.EmbedRequest(inputs=text_inputs(texts))


def _tensors(_request: inference_pb2.EmbedRequest, reply: inference_pb2.EmbedResponse) -> dict[str, Tensor]:
    return {"embedding": Tensor("FP32", [[*result.values] for result in reply.results])}


EMBEDDINGS = Dialect(
    Task.EMBED,
    EMBED,
    text_or_pair,
    _outputs,
    _build,
    lambda request: fields_in(request, "pooling", "normalize", "truncate"),
    _tensors,
)
