"""One request inside the server: what it holds from its admission on, and its flight through the engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, replace
from typing import Generic

from lora_runtime.errors import DeadlineExpired, RequestCancelled
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.types import AdapterInfo, Request, Result, Task
from server.admission import Permits
from server.backend import Backend, Engine, completion
from server.deltas import DeltaHub, DeltaStream, Piece
from server.metrics import ServerMetrics
from server.pb.multilora.v1 import common_pb2
from server.rpc.call import Call, Prepared, ReplyT, RequestT
from server.rpc.caller import caller
from server.rpc.context import Context, remaining_seconds
from server.rpc.generation_meter import GenerationMeter
from server.tenancy.limits import TenantPermit


@dataclass(frozen=True, slots=True)
class Generating:
    """What a flight has beside the others' when text is generated."""

    deltas: DeltaStream
    meter: GenerationMeter


class Flight(Generic[ReplyT]):
    """A request in the engine."""

    def __init__(
        self,
        engine: Engine,
        work: Request,
        prepared: Prepared[ReplyT],
        tokenize_s: float,
        generating: Generating | None,
    ) -> None:
        self.prepared = prepared
        self._engine = engine
        self._request_id = work.request_id
        self._tokenize_s = tokenize_s
        self._generating = generating
        self._is_finished = False
        self._answer = engine.submit(work)
        if generating is not None:
            self._answer.add_done_callback(lambda _: generating.deltas.post_end())

    async def result(self) -> Result:
        """The engine's answer; raises its error."""
        return await completion(self._answer)

    async def pieces(self) -> list[Piece]:
        """What was generated since the last call, once there is some; nothing at the end."""
        assert self._generating is not None, "nothing is generated for this request"
        return await self._generating.deltas.take()

    async def first_pieces(self) -> list[Piece]:
        """As `pieces`, and raises the engine's error when it comes before any."""
        pieces = await self.pieces()
        if not pieces:
            await self.result()
        return pieces

    def finish(self, result: Result) -> None:
        """It is answered."""
        self._is_finished = True
        if self._generating is not None:
            self._generating.meter.finish(result)

    @property
    def num_generated(self) -> int:
        """Tokens so far, of all its samples."""
        return 0 if self._generating is None else self._generating.meter.num_tokens

    def leave(self, reason: FinishReason) -> None:
        """Nobody waits for it any more: the engine drops it when it forms its next batch. `reason`: if unfinished."""
        if not self._answer.done():
            self._engine.cancel(self._request_id)
        if self._generating is not None:
            self._generating.deltas.close()
            if not self._is_finished:
                self._generating.meter.fail(reason)
        self._is_finished = True

    def timings(self, result: Result, interpret_s: float, *, total_s: float) -> common_pb2.Timings:
        return common_pb2.Timings(
            queue_seconds=result.timings.queue_s,
            tokenize_seconds=self._tokenize_s,
            load_wait_seconds=result.timings.load_wait_s,
            forward_seconds=result.timings.forward_s,
            interpret_seconds=interpret_s,
            total_seconds=total_s,
            first_token_seconds=None if self._generating is None else self._generating.meter.first_token_s,
        )


@dataclass(slots=True)
class Turn(Generic[RequestT, ReplyT]):
    """A request from its admission to its end."""

    call: Call[RequestT, ReplyT]
    request: RequestT
    context: Context
    backend: Backend
    info: AdapterInfo  # as it was when the adapter was resolved
    charge: TenantPermit
    permits: Permits
    arrived_s: float  # of `time.monotonic()`
    flight: Flight[ReplyT] | None = None

    def submit(
        self,
        info: AdapterInfo,
        task: Task,
        prepared: Prepared[ReplyT],
        tokenize_s: float,
        hub: DeltaHub,
        metrics: ServerMetrics,
        *,
        keeps_text: bool,
    ) -> Flight[ReplyT]:
        """Hand the tokenised request to the engine."""
        generation, generating = prepared.generation, None
        if generation is not None:
            meter = GenerationMeter(metrics, self.charge, self.arrived_s, prepared.num_sequences)
            generating = Generating(hub.open(meter, keeps_text=keeps_text), meter)
            generation = replace(generation, on_delta=generating.deltas.post)
        remaining_s = remaining_seconds(self.context)
        work = Request(
            request_id=uuid.uuid4().hex,
            adapter=info.id,
            task=task,
            sequences=prepared.sequences,
            deadline_monotonic=None if remaining_s is None else time.monotonic() + remaining_s,
            pooling=prepared.pooling,
            input_of=prepared.input_of,
            tenant=caller().tenant,
            priority=self.request.priority,
            generation=generation,
        )
        self.flight = Flight(self.backend.engine, work, prepared, tokenize_s, generating)
        return self.flight

    def leave(self, error: BaseException | None = None) -> None:
        """The RPC ends: what is still in the engine is dropped there."""
        if self.flight is not None:
            self.flight.leave(self._reason(error))

    def _reason(self, error: BaseException | None) -> FinishReason:
        """Why generation ends without an answer."""
        remaining_s = remaining_seconds(self.context)
        match error:
            case DeadlineExpired():
                return FinishReason.DEADLINE
            case RequestCancelled() | asyncio.CancelledError() | GeneratorExit():
                is_late = remaining_s is not None and remaining_s <= 0
                return FinishReason.DEADLINE if is_late else FinishReason.CANCELLED
            case _:
                return FinishReason.ERROR
