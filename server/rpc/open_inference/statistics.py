"""Statistics of models, from the meter that UsageService shows."""

from __future__ import annotations

from collections.abc import Iterable

from lora_runtime.types import AdapterId
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.open_inference.naming import model_name
from server.tenancy.usage import UsageCounts, UsageMeter


def statistics(meter: UsageMeter, tenant: str | None, models: Iterable[AdapterId]) -> pb.ModelStatisticsResponse:
    """What a tenant, or everybody, asked of each model; in a thread: there may be thousands."""
    asked: dict[AdapterId, list[UsageCounts]] = {}
    for entry in meter.snapshot(tenant):
        if entry.adapter is not None:
            asked.setdefault(entry.adapter, []).append(entry.counts)
    return pb.ModelStatisticsResponse(model_stats=[_entry(model, asked.get(model, [])) for model in models])


def _entry(model: AdapterId, usages: list[UsageCounts]) -> pb.ModelStatistics:
    answered = sum(counts.requests_ok for counts in usages)
    waiting_s = sum(counts.queue_s + counts.load_wait_s for counts in usages)
    forward_s = sum(counts.forward_s for counts in usages)
    return pb.ModelStatistics(
        name=model_name(model),
        version=str(model.version),
        inference_count=sum(counts.sequences for counts in usages),
        execution_count=answered,
        inference_stats=pb.InferStatistics(
            success=_duration(answered, waiting_s + forward_s),
            fail=_duration(sum(counts.requests_failed for counts in usages), 0.0),
            queue=_duration(answered, waiting_s),
            compute_input=_duration(answered, 0.0),
            compute_infer=_duration(answered, forward_s),
            compute_output=_duration(answered, 0.0),
        ),
    )


def _duration(count: int, seconds: float) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=round(seconds * 1e9))
