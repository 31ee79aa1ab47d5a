"""The engine thread: schedule → run → complete, and the only door to it, a queue of messages.

It owns scheduler and residency. It never reads a file and never waits for an adapter: loads are conversations with
the loader threads, and requests for other adapters run meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from lora_runtime.adapter_calls import AdapterCalls
from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.loader import AdapterLoader, Fetching, LoaderMessage, LocalFolders
from lora_runtime.admitting import check_request
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import Resident
from lora_runtime.decoding import Decoding, GenerationStats
from lora_runtime.engine_settings import EngineSettings
from lora_runtime.engine_stats import EngineStats, engine_stats
from lora_runtime.errors import (
    AdapterFailed,
    AdapterNotFound,
    AnswerNotFinite,
    DeadlineExpired,
    EngineStopped,
    InvalidRequest,
    MultiloraError,
    RequestCancelled,
)
from lora_runtime.flight import Flight, Outcome, broken, is_alive
from lora_runtime.futures import settle
from lora_runtime.heads import output_of
from lora_runtime.kv_blocks import KvBlocks
from lora_runtime.mailbox import Mailbox
from lora_runtime.model.runner import Runner
from lora_runtime.observers import EngineObserver, Observers
from lora_runtime.planning import Planned, in_row_order
from lora_runtime.residency import Residency
from lora_runtime.room import Memory
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.scheduler import Scheduler
from lora_runtime.shares import Shares
from lora_runtime.tickets import Ticket, Work
from lora_runtime.tiers import Tier
from lora_runtime.types import (
    AdapterId,
    AdapterInfo,
    BatchStats,
    Request,
    Result,
    Timings,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

_SWEEP_S = 0.05  # how late a deadline may be noticed while the request waits for its adapter
_IDLE_WAIT_S = 0.05


class Engine(AdapterCalls):
    """Every admitted request gets exactly one terminal reply: a Result or a MultiloraError in its future."""

    def __init__(
        self,
        base: BaseSpec,
        runner: Runner,
        arena: RankArena,
        slots: SlotTable,
        settings: EngineSettings,
        *,
        host: RankArena | None = None,
        fetcher: Fetching | None = None,
        blocks: KvBlocks | None = None,
    ) -> None:
        """`host`: memory for images beside the arena, when that is on an accelerator. Without a `fetcher` adapters come
        from local folders alone, and without `blocks` nothing generates."""
        self._runner = runner
        self._settings = settings
        self._observers = Observers()
        self._shares = Shares()
        self._loader = AdapterLoader(
            base,
            fetcher or LocalFolders(),
            arena.num_fp32_bytes,
            settings.num_loader_threads,
            self._from_loader,
            is_busy=lambda: not self._idle,
            a_layout=slots.a_layout,
        )
        memory = Memory(Tier(arena), slots, None if host is None else Tier(host))
        residency = Residency(
            base,
            memory,
            self._loader,
            self._observers,
            self._on_ready,
            self._fail_waiting,
            lambda tenant: self._shares.resident_bytes_of(tenant),
        )
        super().__init__(Mailbox(), residency)
        self._decoding = None
        if blocks is not None:
            most, reuses = settings.most_generating, settings.reuse_prefixes
            self._decoding = Decoding(blocks, residency, most, reuse_prefixes=reuses)
        self._scheduler = Scheduler(
            settings.token_budget,
            settings.max_batch_sequences,
            lambda tenant: self._shares.weight_of(tenant),
            self._decoding,
            settings.beside_tokens,
        )
        self._thread = threading.Thread(target=self._loop, name="multilora-engine", daemon=True)
        self._drain_until: float | None = None  # set once the engine is draining
        self._swept_at = 0.0
        self._turned_at = time.monotonic()
        self._idle = True
        self._flight: Flight | None = None  # the batch that is under way
        self._landed_at = 0.0
        self.ended: Future[None] = Future()  # done when the thread ends: with EngineStopped when it failed

    # Any thread

    def add_observer(self, observer: EngineObserver) -> None:
        """Register before `start`."""
        self._observers.add(observer)

    def use_shares(self, shares: Shares) -> None:
        """What each tenant gets; asked in the engine's thread at every batch and load, so a change applies at once."""
        self._shares = shares

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> Future[Result]:
        """Queue a request; its adapter is loaded on first use. Never raises: refusals are in the future."""
        future: Future[Result] = Future()
        submitted_at = time.monotonic()  # here, not in the engine's thread: the batch that runs now is waited for too
        if not self._mailbox.post(lambda: self._admit(request, future, submitted_at)):
            settle(future, EngineStopped("the engine has stopped; ask another replica"))
        return future

    def cancel(self, request_id: str) -> None:
        """Fail a request with RequestCancelled, unless it has been answered; its sequences leave the queue."""
        self._mailbox.post(lambda: self._cancel(request_id))

    def hold(self, adapters: Sequence[AdapterId]) -> dict[AdapterId, Resident]:
        """Hold READY adapters for code that drives the runner itself; they stay in memory until the engine stops."""
        return self.call(lambda: {adapter: self._residency.acquire(adapter) for adapter in adapters})

    def call(self, action: Callable[[], T]) -> T:
        """Run `action` in the engine's thread, between two steps, and wait for what it returns or raises.

        Code that drives the runner itself belongs there: compute in a second thread has a second team of OpenMP
        threads, and both are slow where they are more than the cores.
        """

        def run(future: Future[T]) -> None:
            self._land()
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001  it is the caller's, and is raised there
                future.set_exception(error)

        return self._mailbox.ask(run).result()

    def check_integrity(self) -> None:
        """Check arena, slots, records and KV blocks between two steps; raises AssertionError."""
        self.call(self._residency.check_integrity)
        if self._decoding is not None:
            self.call(self._decoding.check_integrity)

    def stats(self) -> EngineStats:
        """What waits and runs now, and when the loop last turned. From any thread, and at once."""
        return engine_stats(self._scheduler, self._turned_at)

    def generation_stats(self) -> GenerationStats | None:
        """What the KV cache holds and did; None where nothing generates. From any thread."""
        return None if self._decoding is None else self._decoding.stats()

    def stop(self, drain_seconds: float = 10.0) -> None:
        """Answer what was admitted, for at most `drain_seconds`, fail the rest with EngineStopped, and end."""
        self._mailbox.post(lambda: self._drain(drain_seconds))
        if self._thread.ident is not None:
            self._thread.join()
        self._loader.stop()

    # Engine thread

    def _loop(self) -> None:
        stopped = EngineStopped("the engine stopped before the request was answered; ask another replica")
        failure: EngineStopped | None = None
        try:
            self._run_until_drained()
        except BaseException:  # some libraries raise what is no Exception; whoever waits must learn of it
            logger.exception("the engine failed; every request is refused from now on")
            stopped = failure = EngineStopped("the engine failed and has stopped; ask another replica")
            self._drain(0)
        self._mailbox.close()
        for ticket in self._scheduler.open_tickets():
            self._fail(ticket, stopped)
        self._residency.stop(stopped)
        settle(self.ended, failure)

    def _run_until_drained(self) -> None:
        if self._settings.num_threads is not None:
            torch.set_num_threads(self._settings.num_threads)
        while not self._is_drained():
            self._turned_at = time.monotonic()
            self._mailbox.run_pending(_IDLE_WAIT_S if self._idle else 0)
            self._expire()
            self._step()
            self._residency.settle(self._scheduler.waiting_since)
            self._want_again()
        self._land()

    def _step(self) -> None:
        """Launch a batch, then complete the one before, then draw: with the device beside the host, all but the draw
        is done while the device computes. What ends in a batch is part of the next one too, and dropped there.
        """
        if self._decoding is not None and not self._decoding.can_run_ahead:
            self._land()
        planned = self._schedule()
        self._idle = not planned.work and self._flight is None
        flight = Flight(self._runner, planned, self._flight) if planned.work else None
        self._land()
        if flight is not None:
            flight.draw()
            self._flight = flight
            if not self._settings.run_ahead or flight.has_failed:
                self._land()

    def _land(self) -> None:
        """Complete the batch that is under way, if there is one."""
        flight, self._flight = self._flight, None
        if flight is not None:
            outcomes = flight.land()
            now = time.monotonic()
            forward_s = now - max(flight.launched_at, self._landed_at)
            self._landed_at = now
            self._complete(flight.planned, outcomes, forward_s)

    def _schedule(self) -> Planned:
        work = in_row_order(self._scheduler.schedule(self._residency.is_ready))
        for ticket, error in [] if self._decoding is None else self._decoding.take_broken():
            self._fail(ticket, broken(error))
            work = [item for item in work if not item.ticket.done]
        now = time.monotonic()
        for item in work:
            if item.ticket.started_at is None:
                item.ticket.started_at = now
        adapters = dict.fromkeys(item.ticket.adapter for item in work)
        return Planned(work, {adapter: self._residency.acquire(adapter) for adapter in adapters})

    def _complete(self, planned: Planned, outcomes: list[Outcome], forward_s: float) -> None:
        for adapter in planned.residents:
            self._residency.release(adapter)
        now = time.monotonic()
        for item, outcome in zip(planned.work, outcomes, strict=True):
            if is_alive(item):
                self._take(item, outcome, planned.residents[item.ticket.adapter], now)
        for ticket in planned.places_of_tickets():
            if len(ticket.outputs) == len(ticket.request.sequences) and not ticket.done:
                self._answer(ticket, planned.residents[ticket.adapter], now)
        if any(not isinstance(outcome, MultiloraError) for outcome in outcomes):
            tokens = sum(item.num_tokens for item in planned.work)
            adapters = sum(not adapter.is_base for adapter in planned.residents)
            self._observers.on_batch(BatchStats(len(planned.work), tokens, adapters, forward_s))

    def _take(self, item: Work, outcome: Outcome, resident: Resident, now: float) -> None:
        """What one sequence got of a step."""
        request = item.ticket.request
        if isinstance(outcome, MultiloraError):
            self._fail(item.ticket, outcome)
        elif isinstance(outcome, list):
            self._continue(item, outcome, now)
        elif torch.isfinite(outcome).all():
            item.ticket.outputs[item.index] = output_of(request.task, outcome, resident.card)
        else:
            self._fail(item.ticket, AnswerNotFinite(str(request.adapter), request.input_index(item.index)))

    def _continue(self, item: Work, tokens: list[SampledToken], now: float) -> None:
        """A chunk of a prompt was computed, or a token of each of its continuations drawn."""
        assert self._decoding is not None
        request = item.ticket.request
        drawn = list(zip(item.branches, tokens, strict=True))
        if not all(token.is_finite for token in tokens):
            self._fail(item.ticket, AnswerNotFinite(str(request.adapter), request.input_index(item.index)))
            return
        self._decoding.computed(item, now)
        try:
            for branch, token in drawn:
                delta = branch.take(token)
                if branch.result is None:
                    self._decoding.drew(branch)
                if request.generation is not None and request.generation.on_delta is not None:
                    request.generation.on_delta(delta)
        except BaseException as error:  # noqa: BLE001  a tokenizer's, a grammar's or the caller's, some not in Python
            self._fail(item.ticket, broken(error))
            return
        if ended := [branch for branch in item.branches if branch.result is not None]:
            for branch in ended:
                self._decoding.end(branch)
            if (generated := item.ticket.generated(item.index)) is not None:
                item.ticket.outputs[item.index] = generated

    def _answer(self, ticket: Ticket, resident: Resident, now: float) -> None:
        assert ticket.started_at is not None
        waited = ticket.ready_at - ticket.submitted_at
        queued = max(0.0, ticket.started_at - ticket.submitted_at - waited)
        result = Result(
            adapter=ticket.adapter,
            digest=resident.digest,
            card=resident.card,
            outputs=tuple(ticket.outputs[i] for i in range(len(ticket.request.sequences))),
            timings=Timings(queue_s=queued, load_wait_s=waited, forward_s=now - ticket.started_at),
        )
        self._scheduler.finish(ticket)
        self._reply(ticket.request, ticket.future, result)

    def _fail(self, ticket: Ticket, error: MultiloraError) -> None:
        if not ticket.done:
            self._scheduler.finish(ticket)
            self._reply(ticket.request, ticket.future, error)

    def _reply(self, request: Request, future: Future[Result], outcome: Result | MultiloraError) -> None:
        """The one terminal reply; a caller that cancelled its future gets none but is still counted."""
        self._observers.on_result(request, outcome)
        settle(future, outcome)

    def _admit(self, request: Request, future: Future[Result], submitted_at: float) -> None:
        try:
            if self._drain_until is not None:
                raise EngineStopped("the engine is draining; ask another replica")
            check_request(request, self.catalogue, self._decoding)
            if self._scheduler.find(request.request_id) is not None:
                raise InvalidRequest("request_id", f"{request.request_id[:140]!r} is in flight; give each its own")
            self._residency.want(request.adapter)
        except MultiloraError as error:
            self._reply(request, future, error)
            return
        except Exception:  # our own bug: the engine ends, but this request is not among its tickets yet
            self._reply(request, future, EngineStopped("the engine failed; ask another replica"))
            raise
        ticket = self._scheduler.add(request, future, submitted_at)
        if not self._residency.is_ready(request.adapter):
            ticket.ready_at = float("inf")

    def _cancel(self, request_id: str) -> None:
        if (ticket := self._scheduler.find(request_id)) is not None:
            self._fail(ticket, RequestCancelled("the caller cancelled the request"))

    def _want_again(self) -> None:
        """Requests that were queued when their adapter was unloaded or evicted bring it back."""
        for adapter in self._scheduler.wanted():
            if not self._residency.is_ready(adapter) and self._scheduler.waiting_for(adapter):
                try:
                    self._residency.want(adapter)
                except MultiloraError as error:
                    self._fail_waiting(adapter, error)

    def _on_ready(self, info: AdapterInfo) -> None:
        now = time.monotonic()
        for ticket in self._scheduler.waiting_for(info.id):
            ticket.ready_at = min(ticket.ready_at, now)

    def _fail_waiting(self, adapter: AdapterId, error: MultiloraError) -> None:
        """The adapter cannot be had: whoever waits for it learns why."""
        refused = isinstance(error, AdapterFailed | AdapterNotFound)
        for ticket in self._scheduler.waiting_for(adapter):
            self._fail(ticket, error if refused else AdapterFailed(str(adapter), error))

    def _expire(self) -> None:
        """Answer requests whose deadline has passed, so that no batch carries them."""
        now = time.monotonic()
        if now - self._swept_at < _SWEEP_S and not self._idle:
            return
        self._swept_at = now
        for ticket in self._scheduler.expired(now):
            self._fail(ticket, DeadlineExpired("the deadline passed while the request waited"))

    def _drain(self, drain_seconds: float) -> None:
        if self._drain_until is None:
            self._drain_until = time.monotonic() + drain_seconds

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        return time.monotonic() >= self._drain_until or not self._scheduler.open_tickets()

    def _from_loader(self, message: LoaderMessage) -> None:
        """Called in a loader thread."""
        self._mailbox.post(lambda: self._residency.handle(message))
