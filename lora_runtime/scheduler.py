"""What runs next. Sequences wait per adapter; a batch takes the oldest whose adapter is ready.

Selection is by arrival over all ready adapters, so no request waits for one that came later, whatever the skew; a
request whose adapter is loading is passed over without being looked at again until the adapter is ready.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from lora_runtime.types import AdapterId, Output, Request, Result


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request inside the engine, until its one terminal reply."""

    request: Request
    future: Future[Result]
    arrival: int
    submitted_at: float  # monotonic seconds, as all times here
    ready_at: float  # when the adapter was READY: submitted_at if it was already
    started_at: float | None = None
    next_sequence: int = 0
    outputs: dict[int, Output] = field(default_factory=dict[int, Output])
    done: bool = False

    @property
    def adapter(self) -> AdapterId:
        return self.request.adapter

    @property
    def num_left(self) -> int:
        return len(self.request.sequences) - self.next_sequence


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence chosen for the next batch."""

    ticket: Ticket
    index: int

    @property
    def num_tokens(self) -> int:
        return self.ticket.request.sequences[self.index].num_tokens


class Scheduler:
    """Bounds each step by tokens and sequences. Owned by the engine thread."""

    def __init__(self, token_budget: int, max_sequences: int) -> None:
        self._token_budget = token_budget
        self._max_sequences = max_sequences
        self._queues: dict[AdapterId, deque[Ticket]] = {}  # by arrival; no queue is empty
        self._tickets: dict[str, Ticket] = {}
        self._arrivals = 0

    def open_tickets(self) -> list[Ticket]:
        """Requests that have not had their reply, oldest first."""
        return list(self._tickets.values())

    def add(self, request: Request, future: Future[Result], now: float) -> Ticket:
        """Queue a request behind those that came before it."""
        self._arrivals += 1
        ticket = Ticket(request, future, self._arrivals, now, now)
        self._queues.setdefault(request.adapter, deque()).append(ticket)
        self._tickets[request.request_id] = ticket
        return ticket

    def find(self, request_id: str) -> Ticket | None:
        return self._tickets.get(request_id)

    def waiting_for(self, adapter: AdapterId) -> tuple[Ticket, ...]:
        """Requests queued for one adapter, oldest first."""
        return tuple(ticket for ticket in self._queues.get(adapter, ()) if not ticket.done)

    def wanted(self) -> Iterable[AdapterId]:
        """Adapters that have requests queued."""
        return tuple(self._queues)

    def waiting_since(self) -> dict[AdapterId, float]:
        """The submission of the oldest request that is queued for each adapter."""
        return {adapter: self._queues[adapter][0].submitted_at for adapter in self._live_queues()}

    def finish(self, ticket: Ticket) -> None:
        """Forget a request that has had its terminal reply; one that still waits leaves its queue."""
        ticket.done = True
        self._tickets.pop(ticket.request.request_id, None)
        queue = self._queues.get(ticket.adapter)
        if queue and ticket.num_left:
            queue.remove(ticket)
            if not queue:
                del self._queues[ticket.adapter]

    def expired(self, now: float) -> list[Ticket]:
        """Requests whose deadline has passed, started or not."""
        deadlines = ((t, t.request.deadline_monotonic) for t in self._tickets.values())
        return [ticket for ticket, deadline in deadlines if deadline is not None and deadline <= now]

    def schedule(self, is_ready: Callable[[AdapterId], bool]) -> list[Work]:
        """Take the oldest sequences of ready adapters, up to the budget; at least one if any is ready."""
        heap = [(self._queues[a][0].arrival, a) for a in self._live_queues() if is_ready(a)]
        heapq.heapify(heap)
        chosen: list[Work] = []
        tokens = 0
        while heap and len(chosen) < self._max_sequences:
            adapter = heapq.heappop(heap)[1]
            ticket = self._queues[adapter][0]
            work = Work(ticket, ticket.next_sequence)
            if chosen and tokens + work.num_tokens > self._token_budget:
                break
            chosen.append(work)
            tokens += work.num_tokens
            ticket.next_sequence += 1
            if (head := self._head(adapter)) is not None:
                heapq.heappush(heap, (head.arrival, adapter))
        return chosen

    def _live_queues(self) -> list[AdapterId]:
        return [adapter for adapter in list(self._queues) if self._head(adapter) is not None]

    def _head(self, adapter: AdapterId) -> Ticket | None:
        """The oldest request of an adapter with a sequence left; those that have none go, an empty queue too."""
        queue = self._queues[adapter]
        while queue and not queue[0].num_left:
            queue.popleft()
        if not queue:
            del self._queues[adapter]
            return None
        return queue[0]
