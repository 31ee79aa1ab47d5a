"""What the runtime tells of adapters, as proto messages; enums as enums."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lora_runtime.types import AdapterInfo, AdapterState, Alias, Pooling, ProblemType, Task
from server.control.events import AdapterChanged, AdapterDeleted, AliasChanged, AliasDeleted, Event
from server.pb.multilora.v1 import adapters_pb2, common_pb2

STATES: dict[AdapterState, adapters_pb2.AdapterState.ValueType] = {
    AdapterState.REGISTERED: adapters_pb2.ADAPTER_STATE_REGISTERED,
    AdapterState.FETCHING: adapters_pb2.ADAPTER_STATE_FETCHING,
    AdapterState.HOST: adapters_pb2.ADAPTER_STATE_HOST,
    AdapterState.COPYING: adapters_pb2.ADAPTER_STATE_COPYING,
    AdapterState.READY: adapters_pb2.ADAPTER_STATE_READY,
    AdapterState.DRAINING: adapters_pb2.ADAPTER_STATE_DRAINING,
    AdapterState.FAILED: adapters_pb2.ADAPTER_STATE_FAILED,
}
TASKS: dict[Task, common_pb2.Task.ValueType] = {
    Task.CLASSIFY: common_pb2.TASK_CLASSIFY,
    Task.CLASSIFY_TOKENS: common_pb2.TASK_CLASSIFY_TOKENS,
    Task.ANSWER: common_pb2.TASK_ANSWER,
    Task.EMBED: common_pb2.TASK_EMBED,
    Task.GENERATE: common_pb2.TASK_GENERATE,
}
POOLINGS: dict[Pooling, common_pb2.Pooling.ValueType] = {
    Pooling.MEAN: common_pb2.POOLING_MEAN,
    Pooling.CLS: common_pb2.POOLING_CLS,
    Pooling.LAST: common_pb2.POOLING_LAST,
}
PROBLEM_TYPES: dict[ProblemType, common_pb2.ProblemType.ValueType] = {
    ProblemType.SINGLE_LABEL: common_pb2.PROBLEM_TYPE_SINGLE_LABEL,
    ProblemType.MULTI_LABEL: common_pb2.PROBLEM_TYPE_MULTI_LABEL,
    ProblemType.REGRESSION: common_pb2.PROBLEM_TYPE_REGRESSION,
}


def alias_message(alias: Alias) -> adapters_pb2.Alias:
    return adapters_pb2.Alias(
        name=alias.resource_name,
        version=alias.version,
        canary_version=alias.canary_version or 0,
        canary_percent=alias.canary_percent,
        previous_version=alias.previous_version or 0,
    )


def change_message(
    event: Event, describe: Callable[[AdapterInfo], adapters_pb2.Adapter], resume_token: str
) -> adapters_pb2.WatchAdaptersResponse:
    """One change, as a watcher gets it."""
    message = adapters_pb2.WatchAdaptersResponse(resume_token=resume_token)
    match event:
        case AdapterChanged(info):
            message.adapter.CopyFrom(describe(info))
        case AdapterDeleted(adapter):
            message.deleted_adapter = adapter.resource_name
        case AliasChanged(alias):
            message.alias.CopyFrom(alias_message(alias))
        case AliasDeleted(alias):
            message.deleted_alias = alias.resource_name
    return message


def adapter_message(info: AdapterInfo, source: str, aliases: Iterable[str]) -> adapters_pb2.Adapter:
    """`source` as clients may see it."""
    message = adapters_pb2.Adapter(
        name=info.id.resource_name,
        version=info.id.version,
        state=STATES[info.state],
        digest=info.digest or "",
        ranks=info.ranks,
        resident_bytes=info.resident_bytes,
        num_parameters=info.num_parameters,
        load_seconds=info.load_seconds,
        source=source,
        pinned=info.pinned,
        host_bytes=info.host_bytes,
        aliases=aliases,
    )
    if info.failure is not None:
        message.failure.reason = info.failure.reason
        message.failure.message = info.failure.message
        message.failure.retryable = info.failure.retry_after_s is not None
    if card := info.card:
        message.task = TASKS[card.task]
        message.problem_type = PROBLEM_TYPES[card.problem_type]
        message.labels.extend(card.labels or ())
        message.metrics.update(card.metrics)
        message.base_model_name = card.base_model_name or ""
        message.normalize = card.normalize
        message.own_tokenizer = card.tokenizer_sha256 is not None
        if card.max_length is not None:
            message.max_length = card.max_length
        if card.pooling is not None:
            message.pooling = POOLINGS[card.pooling]
    return message
