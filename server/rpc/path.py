"""The one path of every inference RPC: resolve, check, admit, tokenise, submit, interpret, reply.

What differs between tasks is a `Call`; a reply comes as one message, or as pieces of text before it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from lora_runtime.errors import AdapterNotFound
from lora_runtime.types import AdapterInfo, AdapterState, Result
from server.admission import Admission
from server.backend import BackendSlot, Engine, completion
from server.deltas import DeltaHub, Piece
from server.metrics import ServerMetrics
from server.rpc.call import Call, Prepared, ReplyT, RequestT, Target
from server.rpc.caller import note_work, require, resolve
from server.rpc.checks import Bounds, check_content, check_fits, check_routing, estimated_tokens
from server.rpc.context import Context, remaining_seconds
from server.rpc.turn import Flight, Turn
from server.tenancy.limits import TenantLimits
from server.tenancy.model import Role
from server.tokenize import TokenizerPool

T = TypeVar("T")


class InferencePath:
    """Belongs to the asyncio loop."""

    def __init__(
        self,
        slot: BackendSlot,
        admission: Admission,
        limits: TenantLimits,
        tokenizers: TokenizerPool,
        metrics: ServerMetrics,
        bounds: Bounds,
    ) -> None:
        self._slot = slot
        self._admission = admission
        self._limits = limits
        self._tokenizers = tokenizers
        self._metrics = metrics
        self._bounds = bounds
        self._hub = DeltaHub()

    async def answer(self, call: Call[RequestT, ReplyT], request: RequestT, context: Context) -> ReplyT:
        """Answer a request of any task; permits are held from here until the reply is complete."""
        with self._admitted(call, request, context) as turn:
            flight, result = await self._started(turn, lambda flight: flight.result(), keeps_text=False)
            return await self._reply(turn, flight, result)

    async def stream(
        self, call: Call[RequestT, ReplyT], request: RequestT, context: Context
    ) -> AsyncGenerator[Piece | ReplyT]:
        """As `answer` of one generating sequence, with pieces of its text before the reply.

        Whatever ends it early ends the request in the engine.
        """
        with self._metrics.open_stream(), self._admitted(call, request, context) as turn:
            flight, pieces = await self._started(turn, lambda flight: flight.first_pieces(), keeps_text=True)
            while pieces:
                for piece in pieces:
                    yield piece
                pieces = await flight.pieces()
            yield await self._reply(turn, flight, await flight.result())

    @contextmanager
    def _admitted(
        self, call: Call[RequestT, ReplyT], request: RequestT, context: Context
    ) -> Generator[Turn[RequestT, ReplyT]]:
        arrived_s = time.monotonic()
        backend = self._slot.get()
        tenant = require(Role.INFER).tenant
        check_routing(request)
        info = resolve(backend.engine.catalogue, request.adapter, request.routing_key)
        check_content(request, self._bounds, call.check)
        if info.card is not None:
            call.suiting(info)  # refused before anything is spent on it
        num_sequences = len(request.inputs) * call.num_samples(request)
        check_fits(num_sequences, self._admission.max_sequences)
        with (
            self._limits.admit(tenant, num_sequences, estimated_tokens(request)) as charge,
            self._admission.permits(num_sequences, remaining_seconds(context), tenant) as permits,
        ):
            turn = Turn(call, request, context, backend, info, charge, permits, arrived_s)
            try:
                yield turn
            except BaseException as error:
                turn.leave(error)
                raise
            turn.leave()

    async def _started(
        self,
        turn: Turn[RequestT, ReplyT],
        begin: Callable[[Flight[ReplyT]], Awaitable[T]],
        *,
        keeps_text: bool,
    ) -> tuple[Flight[ReplyT], T]:
        """Have the engine begin, and what `begin` waits for then: nothing has been sent before that."""
        try:
            flight = await self._submit(turn, keeps_text=keeps_text)
            return flight, await begin(flight)
        except AdapterNotFound:  # deleted meanwhile; its alias had moved on before that, or this raises again
            turn.info = resolve(turn.backend.engine.catalogue, turn.request.adapter, turn.request.routing_key)
            flight = await self._submit(turn, keeps_text=keeps_text)
            return flight, await begin(flight)

    async def _submit(self, turn: Turn[RequestT, ReplyT], *, keeps_text: bool) -> Flight[ReplyT]:
        """Tokenise for one adapter version and hand it to the engine."""
        info = await _fetched(turn.backend.engine, turn.info)
        call = turn.call.suiting(info)
        target = Target(turn.backend, info, info.card_for(call.task), self._bounds.max_new_tokens)
        prepared, tokenize_s = await self._in_pool("tokenize", lambda: call.prepare(turn.request, target))
        num_tokens = sum(sequence.num_tokens for sequence in prepared.sequences)
        turn.charge.settle_tokens(num_tokens)
        note_work(num_sequences=prepared.num_sequences, input_tokens=num_tokens)
        self._grow(turn, prepared)
        return turn.submit(info, call.task, prepared, tokenize_s, self._hub, self._metrics, keeps_text=keeps_text)

    def _grow(self, turn: Turn[RequestT, ReplyT], prepared: Prepared[ReplyT]) -> None:
        """Take permits for the windows of long texts, which are known only now."""
        check_fits(prepared.num_sequences, self._admission.max_sequences)
        turn.permits.grow_to(prepared.num_sequences)
        turn.charge.grow_to(prepared.num_sequences)

    async def _reply(self, turn: Turn[RequestT, ReplyT], flight: Flight[ReplyT], result: Result) -> ReplyT:
        flight.finish(result)
        reply, interpret_s = await self._in_pool("interpret", lambda: flight.prepared.interpret(result))
        reply.adapter = result.adapter.resource_name
        reply.version = result.adapter.version
        reply.digest = result.digest
        total_s = time.monotonic() - turn.arrived_s
        self._metrics.observe_stage("total", total_s)
        reply.timings.CopyFrom(flight.timings(result, interpret_s, total_s=total_s))
        note_work(
            generated_tokens=flight.num_generated,
            **{stage.name: round(value, 6) for stage, value in reply.timings.ListFields()},
        )
        return reply

    async def _in_pool(self, stage: str, work: Callable[[], T]) -> tuple[T, float]:
        """The result of `work` in a tokeniser thread, and the seconds that took, the wait for a thread included."""
        started = time.perf_counter()
        done = await self._tokenizers.run(work)
        seconds = time.perf_counter() - started
        self._metrics.observe_stage(stage, seconds)
        return done, seconds


async def described(engine: Engine, reference: str, routing_key: str = "") -> AdapterInfo:
    """The adapter that the caller means, with what its files say of it, which are fetched where they are not known.

    Raises as `resolve`, AdapterFailed where the files are refused.
    """
    info = resolve(engine.catalogue, reference, routing_key)
    return info if info.card is not None else await _fetched(engine, info)


async def _fetched(engine: Engine, info: AdapterInfo) -> AdapterInfo:
    """Start the load of a cold adapter while its texts are tokenised; wait only for what tokenising needs of it.

    That is its card, and its files where it has a tokenizer of its own.
    """
    if info.state is AdapterState.READY:
        return info
    fetching = engine.prefetch(info.id)
    if info.card is None or (info.path is None and info.card.tokenizer_sha256 is not None):
        return await completion(fetching)
    return info
