"""Runtime values as proto messages."""

from __future__ import annotations

from lora_runtime.types import (
    AdapterInfo,
    AdapterState,
    Classification,
    ProblemType,
    Result,
    Task,
    TokenSequence,
)
from server.pb.multilora.v1 import adapters_pb2, common_pb2, inference_pb2

STATES: dict[AdapterState, adapters_pb2.AdapterState.ValueType] = {
    AdapterState.REGISTERED: adapters_pb2.ADAPTER_STATE_REGISTERED,
    AdapterState.FETCHING: adapters_pb2.ADAPTER_STATE_FETCHING,
    AdapterState.HOST: adapters_pb2.ADAPTER_STATE_HOST,
    AdapterState.COPYING: adapters_pb2.ADAPTER_STATE_COPYING,
    AdapterState.READY: adapters_pb2.ADAPTER_STATE_READY,
    AdapterState.DRAINING: adapters_pb2.ADAPTER_STATE_DRAINING,
    AdapterState.FAILED: adapters_pb2.ADAPTER_STATE_FAILED,
}
TASKS: dict[Task, common_pb2.Task.ValueType] = {Task.CLASSIFY: common_pb2.TASK_CLASSIFY}
PROBLEM_TYPES: dict[ProblemType, common_pb2.ProblemType.ValueType] = {
    ProblemType.SINGLE_LABEL: common_pb2.PROBLEM_TYPE_SINGLE_LABEL,
    ProblemType.MULTI_LABEL: common_pb2.PROBLEM_TYPE_MULTI_LABEL,
    ProblemType.REGRESSION: common_pb2.PROBLEM_TYPE_REGRESSION,
}


def adapter_message(info: AdapterInfo) -> adapters_pb2.Adapter:
    message = adapters_pb2.Adapter(
        name=info.id.resource_name,
        version=info.id.version,
        state=STATES[info.state],
        digest=info.digest or "",
        ranks=info.ranks,
        resident_bytes=info.resident_bytes,
        num_parameters=info.num_parameters,
        load_seconds=info.load_seconds,
    )
    if info.failure is not None:
        message.failure.reason = info.failure.reason
        message.failure.message = info.failure.message
    if card := info.card:
        message.task = TASKS[card.task]
        message.problem_type = PROBLEM_TYPES[card.problem_type]
        message.labels.extend(card.labels or ())
        message.metrics.update(card.metrics)
        message.base_model_name = card.base_model_name or ""
        if card.max_length is not None:
            message.max_length = card.max_length
    return message


def classify_response(
    result: Result,
    sequences: tuple[TokenSequence, ...],
    request: inference_pb2.ClassifyRequest,
    *,
    tokenize_seconds: float,
    total_seconds: float,
) -> inference_pb2.ClassifyResponse:
    """The reply to `request`; `sequences` are its inputs as tokens, in their order."""
    labels = result.card.labels
    assert labels is not None, "a result comes from loaded weights, whose labels are known"
    top_k = request.top_k if request.HasField("top_k") else len(labels)
    timings = result.timings
    return inference_pb2.ClassifyResponse(
        adapter=result.adapter.resource_name,
        version=result.adapter.version,
        digest=result.digest,
        results=[
            _classify_result(output, sequence, labels, top_k, with_logits=request.return_logits)
            for output, sequence in zip(result.outputs, sequences, strict=True)
        ],
        labels=labels if request.return_logits else (),
        timings=common_pb2.Timings(
            queue_seconds=timings.queue_s,
            tokenize_seconds=tokenize_seconds,
            load_wait_seconds=timings.load_wait_s,
            forward_seconds=timings.forward_s,
            total_seconds=total_seconds,
        ),
    )


def _classify_result(
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
