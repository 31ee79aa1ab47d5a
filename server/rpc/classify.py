"""Classify: texts, or pairs of texts, to scores over an adapter's labels."""

from __future__ import annotations

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import Classification, Result, Task, TokenSequence
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Call, Prepared, Target, labels_of, outputs_of, text_pairs


def _check(request: inference_pb2.ClassifyRequest) -> None:
    if request.HasField("top_k") and request.top_k < 1:
        raise InvalidRequest("top_k", f"{request.top_k} is less than 1; leave it unset to get every label")


def _prepare(request: inference_pb2.ClassifyRequest, target: Target) -> Prepared[inference_pb2.ClassifyResponse]:
    texts = text_pairs(request.inputs)
    sequences = target.encoder.encode(texts, max_length=target.card.max_length, truncate=request.truncate)
    return Prepared(sequences, lambda result: _response(request, sequences, result))


def _response(
    request: inference_pb2.ClassifyRequest, sequences: tuple[TokenSequence, ...], result: Result
) -> inference_pb2.ClassifyResponse:
    labels = labels_of(result)
    top_k = request.top_k if request.HasField("top_k") else len(labels)
    outputs = outputs_of(result, Classification)
    return inference_pb2.ClassifyResponse(
        results=[
            _result(output, sequence, labels, top_k, with_logits=request.return_logits)
            for output, sequence in zip(outputs, sequences, strict=True)
        ],
        labels=labels if request.return_logits else (),
    )


def _result(
    output: Classification, sequence: TokenSequence, labels: tuple[str, ...], top_k: int, *, with_logits: bool
) -> inference_pb2.ClassifyResult:
    # sorted() is stable, so equal scores keep the order of the labels
    order = sorted(range(len(labels)), key=lambda index: -output.scores[index])[:top_k]
    return inference_pb2.ClassifyResult(
        scores=[inference_pb2.LabelScore(label=labels[index], score=output.scores[index]) for index in order],
        logits=output.logits if with_logits else (),
        num_tokens=sequence.num_tokens,
        truncated=sequence.truncated,
    )


CLASSIFY = Call(Task.CLASSIFY, _check, _prepare)
