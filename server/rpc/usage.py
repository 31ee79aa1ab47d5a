"""UsageService: who used what."""

from __future__ import annotations

import asyncio

from server.pb.multilora.v1 import usage_pb2 as pb
from server.pb.multilora.v1 import usage_pb2_grpc
from server.rpc.caller import tenant_filter
from server.rpc.context import Context
from server.tenancy.usage import UsageEntry, UsageMeter

_OTHER = "other"


class UsageService(usage_pb2_grpc.UsageServiceServicer):
    """Counts of the engine, as a caller may see them."""

    def __init__(self, meter: UsageMeter) -> None:
        self._meter = meter

    async def GetUsage(self, request: pb.GetUsageRequest, context: Context) -> pb.GetUsageResponse:  # noqa: N802
        del context
        tenant = tenant_filter(request.tenant)
        entries = await asyncio.to_thread(self._meter.snapshot, tenant)
        reply = pb.GetUsageResponse(entries=map(_message, entries))
        reply.since.FromNanoseconds(round(self._meter.since_unix_s * 1e9))
        return reply


def _message(entry: UsageEntry) -> pb.UsageEntry:
    counts = entry.counts
    return pb.UsageEntry(
        tenant=entry.tenant or _OTHER,
        adapter=entry.adapter.resource_name if entry.adapter else _OTHER,
        requests=counts.requests_ok,
        failed_requests=counts.requests_failed,
        sequences=counts.sequences,
        input_tokens=counts.input_tokens,
        output_tokens=counts.output_tokens,
        queue_seconds=counts.queue_s,
        load_wait_seconds=counts.load_wait_s,
        forward_seconds=counts.forward_s,
    )
