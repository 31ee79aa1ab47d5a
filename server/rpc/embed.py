"""Embed: texts, or pairs of texts, to vectors."""

from __future__ import annotations

from lora_runtime.answers.vectors import unit_length
from lora_runtime.errors import InvalidRequest
from lora_runtime.types import Embedding, Pooling, Result, Task, TokenSequence
from server.pb.multilora.v1 import common_pb2, inference_pb2
from server.rpc.call import Call, Prepared, Target, outputs_of, text_pairs
from server.rpc.messages import POOLINGS

_REQUESTED: dict[common_pb2.Pooling.ValueType, Pooling | None] = {
    common_pb2.POOLING_UNSPECIFIED: None,
    **{value: pooling for pooling, value in POOLINGS.items()},
}


def _check(request: inference_pb2.EmbedRequest) -> None:
    if request.pooling not in _REQUESTED:
        raise InvalidRequest("pooling", f"{request.pooling} is not a Pooling; leave it unset for the adapter's own")


def _prepare(request: inference_pb2.EmbedRequest, target: Target) -> Prepared[inference_pb2.EmbedResponse]:
    texts = text_pairs(request.inputs)
    sequences = target.encoder.encode(texts, max_length=target.card.max_length, truncate=request.truncate)
    # always named, so that the pooling in the reply is the one that was used
    pooling = _REQUESTED[request.pooling] or target.card.pooling
    assert pooling is not None, "the card of what embeds names a pooling"
    return Prepared(sequences, lambda result: _response(request, sequences, pooling, result), pooling)


def _response(
    request: inference_pb2.EmbedRequest, sequences: tuple[TokenSequence, ...], pooling: Pooling, result: Result
) -> inference_pb2.EmbedResponse:
    normalize = request.normalize if request.HasField("normalize") else result.card.normalize
    vectors = [output.values for output in outputs_of(result, Embedding)]
    return inference_pb2.EmbedResponse(
        results=[
            inference_pb2.EmbedResult(
                values=unit_length(values) if normalize else values,
                num_tokens=sequence.num_tokens,
                truncated=sequence.truncated,
            )
            for values, sequence in zip(vectors, sequences, strict=True)
        ],
        dimension=len(vectors[0]),
        pooling=POOLINGS[pooling],
        normalize=normalize,
    )


EMBED = Call(Task.EMBED, _check, _prepare)
