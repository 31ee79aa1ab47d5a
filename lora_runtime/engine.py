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
from dataclasses import dataclass
from typing import TypeVar

import torch

from lora_runtime.adapter_calls import AdapterCalls
from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.loader import AdapterLoader, Fetching, LoaderMessage, LocalFolders
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import Resident, Row
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
from lora_runtime.futures import settle
from lora_runtime.heads import output_of
from lora_runtime.mailbox import Mailbox
from lora_runtime.model.runner import Runner
from lora_runtime.observers import EngineObserver, Observers
from lora_runtime.residency import Residency
from lora_runtime.room import Memory
from lora_runtime.scheduler import Scheduler, Ticket, Work
from lora_runtime.shares import Shares
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
_Outcome = torch.Tensor | MultiloraError  # of one sequence of a batch

_SWEEP_S = 0.05  # how late a deadline may be noticed while the request waits for its adapter
_IDLE_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of one engine."""

    token_budget: int = 256  # tokens per step
    max_batch_sequences: int = 256
    num_loader_threads: int = 1
    num_threads: int | None = None  # torch's intra-op threads; None leaves torch's choice


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch in flight: its work in row order, and the adapters it holds."""

    work: list[Work]
    residents: dict[AdapterId, Resident]


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
    ) -> None:
        """`host`: memory for images beside the arena, when that is on an accelerator. Without a `fetcher` adapters come
        from local folders alone."""
        self._runner = runner
        self._settings = settings
        self._observers = Observers()
        self._shares = Shares()
        self._scheduler = Scheduler(
            settings.token_budget,
            settings.max_batch_sequences,
            lambda tenant: self._shares.weight_of(tenant),
        )
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
        self._thread = threading.Thread(target=self._loop, name="multilora-engine", daemon=True)
        self._drain_until: float | None = None  # set once the engine is draining
        self._swept_at = 0.0
        self._idle = True
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
            try:
                future.set_result(action())
            except Exception as error:  # noqa: BLE001  it is the caller's, and is raised there
                future.set_exception(error)

        return self._mailbox.ask(run).result()

    def check_integrity(self) -> None:
        """Check arena, slots and records between two steps; raises AssertionError."""
        self.call(self._residency.check_integrity)

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
        except Exception:
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
            self._mailbox.run_pending(_IDLE_WAIT_S if self._idle else 0)
            self._expire()
            self._step()
            self._residency.settle(self._scheduler.waiting_since)
            self._want_again()

    def _step(self) -> None:
        planned = self._schedule()
        self._idle = not planned.work
        if planned.work:
            started = time.monotonic()
            outcomes = self._run(planned)
            self._complete(planned, outcomes, time.monotonic() - started)

    def _schedule(self) -> _Planned:
        """The next batch, rows of one adapter adjacent, adapters by length so that equal lengths meet."""
        work = self._scheduler.schedule(self._residency.is_ready)
        now = time.monotonic()
        of_adapter: dict[AdapterId, list[Work]] = {}
        for item in work:
            if item.ticket.started_at is None:
                item.ticket.started_at = now
            of_adapter.setdefault(item.ticket.adapter, []).append(item)
        for items in of_adapter.values():
            items.sort(key=lambda item: item.num_tokens)
        ordered = sorted(of_adapter.values(), key=lambda items: items[0].num_tokens)
        residents = {adapter: self._residency.acquire(adapter) for adapter in of_adapter}
        return _Planned([item for items in ordered for item in items], residents)

    def _run(self, planned: _Planned) -> list[_Outcome]:
        """What each sequence of the batch gets. Of a batch that fails, each request is run again by itself.

        So a request that cannot be run, by its tokens or by its adapter, takes nobody along.
        """
        rows: list[Row] = []
        of_ticket: dict[Ticket, list[int]] = {}
        for place, item in enumerate(planned.work):
            request = item.ticket.request
            resident = planned.residents[request.adapter]
            rows.append(Row(request.sequences[item.index], resident, request.task, request.pooling))
            of_ticket.setdefault(item.ticket, []).append(place)
        outcomes = self._run_rows(rows)
        if len(of_ticket) > 1 and isinstance(outcomes[0], MultiloraError):
            for places in of_ticket.values():
                for place, outcome in zip(places, self._run_rows([rows[i] for i in places]), strict=True):
                    outcomes[place] = outcome
        return outcomes

    def _run_rows(self, rows: list[Row]) -> list[_Outcome]:
        try:
            return [*self._runner.run(rows)]
        except Exception as error:
            logger.exception("a batch of %d sequences failed", len(rows))
            return [MultiloraError(f"the forward pass failed: {type(error).__name__}")] * len(rows)

    def _complete(self, planned: _Planned, outcomes: list[_Outcome], forward_s: float) -> None:
        for adapter in planned.residents:
            self._residency.release(adapter)
        now = time.monotonic()
        for item, outcome in zip(planned.work, outcomes, strict=True):
            resident = planned.residents[item.ticket.adapter]
            request = item.ticket.request
            if isinstance(outcome, MultiloraError):
                self._fail(item.ticket, outcome)
            elif torch.isfinite(outcome).all():
                item.ticket.outputs[item.index] = output_of(request.task, outcome, resident.card)
            else:
                self._fail(item.ticket, AnswerNotFinite(str(request.adapter), request.input_index(item.index)))
        for ticket in {item.ticket: None for item in planned.work}:
            if len(ticket.outputs) == len(ticket.request.sequences) and not ticket.done:
                self._answer(ticket, planned.residents[ticket.adapter], now)
        if any(isinstance(outcome, torch.Tensor) for outcome in outcomes):
            tokens = sum(item.num_tokens for item in planned.work)
            adapters = sum(not adapter.is_base for adapter in planned.residents)
            self._observers.on_batch(BatchStats(len(planned.work), tokens, adapters, forward_s))

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
            self._check(request)
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

    def _check(self, request: Request) -> None:
        if not request.sequences:
            raise InvalidRequest("sequences", "is empty; a request has at least one")
        info = self.catalogue.get(request.adapter)
        if not info.is_read:
            raise InvalidRequest("adapter", f"{info.id} has not been read yet; prefetch it before it is asked")
        num_ids = info.card_for(request.task).num_token_ids
        for index, sequence in enumerate(request.sequences):
            field = f"inputs[{request.input_index(index)}].text"
            if not sequence.num_tokens:
                raise InvalidRequest(field, "has no tokens")
            if num_ids is not None and max(sequence.input_ids) >= num_ids:  # the batch would fail, for all in it
                message = f"has the token id {max(sequence.input_ids)}, the embedding {num_ids} rows"
                raise InvalidRequest(field, f"{message}; leave out the text that the tokenizer added a token for")
        if self._scheduler.find(request.request_id) is not None:
            raise InvalidRequest("request_id", f"{request.request_id[:140]!r} is in flight; give each request its own")

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
