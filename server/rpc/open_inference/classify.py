"""CLASSIFY: texts to the best labels, and to every label's score and logit."""

from __future__ import annotations

from dataclasses import replace

from lora_runtime.types import AdapterCard, Task
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Prepared, Target
from server.rpc.classify import CLASSIFY
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


def _outputs(card: AdapterCard) -> tuple[OutputSpec, ...]:
    num_labels = -1 if card.labels is None else len(card.labels)
    return (
        OutputSpec("label", "BYTES"),
        OutputSpec("score", "FP32"),
        OutputSpec("scores", "FP32", num_labels, is_ranked=True),
        OutputSpec("logits", "FP32", num_labels, is_ranked=True),
    )


def _build(texts: Texts, card: AdapterCard) -> inference_pb2.ClassifyRequest:
    check_inputs(texts, text_or_pair(card))
    return inference_pb2.ClassifyRequest(inputs=text_inputs(texts), return_logits=True)


def _prepare(request: inference_pb2.ClassifyRequest, target: Target) -> Prepared[inference_pb2.ClassifyResponse]:
    """Every label is asked for: `top_k`, which was checked, is for `label` and `score` alone."""
    every = inference_pb2.ClassifyRequest()
    every.CopyFrom(request)
    every.ClearField("top_k")
    return CLASSIFY.prepare(every, target)


def _tensors(request: inference_pb2.ClassifyRequest, reply: inference_pb2.ClassifyResponse) -> dict[str, Tensor]:
    top_k = min(request.top_k or 1, len(reply.labels))  # 0 was refused where it was set
    return {
        "label": Tensor("BYTES", [[entry.label for entry in result.scores[:top_k]] for result in reply.results]),
        "score": Tensor("FP32", [[entry.score for entry in result.scores[:top_k]] for result in reply.results]),
        "scores": Tensor("FP32", [_in_order(result) for result in reply.results]),
        "logits": Tensor("FP32", [[*result.logits] for result in reply.results]),
    }


def _in_order(result: inference_pb2.ClassifyResult) -> list[float]:
    """Scores in the order of the labels: they rise with the logits, so both rank the labels alike."""
    ranked = sorted(range(len(result.logits)), key=lambda index: -result.logits[index])
    scores = [0.0] * len(ranked)
    for index, entry in zip(ranked, result.scores, strict=True):
        scores[index] = entry.score
    return scores


CLASSIFICATION = Dialect(
    Task.CLASSIFY,
    replace(CLASSIFY, prepare=_prepare),
    text_or_pair,
    _outputs,
    _build,
    lambda request: fields_in(request, "top_k", "truncate"),
    _tensors,
)
