"""What runs next: weighted fairness between tenants, then between each tenant's adapters. There is no timer: the next
batch forms while the device is busy.

Both levels are virtual token counters (Sheng et al. 2024, "Fairness in serving large language models"): whoever waits
with the least service per weight is served next. One that comes back from idling is lifted to just below those that
wait: it has a credit of at most `CREDIT_TOKENS`, which lets a tenant that asks for less than its share go before one
that asks for more, even when its requests come in bursts. Whoever finds the engine idle takes nothing from anybody, and
raises the level that credit is counted from. A batch that begins with a tenant in credit is not filled up by those with
a backlog, or each small request would take as long as the largest batch: they get what is left of a quarter of it.
Chosen over deficit round robin, whose turns go in a cycle: a tenant that comes back does not wait for the cycle's end,
and the bound does not grow with the number of tenants. The bound: while two tenants both wait for ready adapters, their
service per weight drifts apart by at most one turn (`TURN_TOKENS` and the sequence that passes it) per weight, beside
the credit that one of them began with.

Sequences that generate (see `decoding.py`) take one token of every step, before anything else, since each of them is
work that has begun; those tokens count as service too. Beside them a step takes few other tokens, so that none of their
readers waits long for the next one. Their prompts have their turns like all sequences, and are cut
where a turn or the step ends. A prompt that the KV cache has no room for waits, and no other begins before it does.

A flow is one tenant's requests for one adapter at one priority, in order of arrival. Flows share their tenant's service
by `PRIORITY_BASE ** priority`, so a high priority goes first without ever stopping a low one. Requests whose adapter is
loading are passed over.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from lora_runtime.decoding import Decoding
from lora_runtime.flows import Draft, Flow, TenantFlows
from lora_runtime.tickets import Ticket, Work
from lora_runtime.types import AdapterId, Request, Result

CREDIT_TOKENS = 2048.0  # that idling may earn, over the weight
_LIGHT_TOKENS = CREDIT_TOKENS / 4  # of credit, from which on others do not fill up the batch
_FILL = 0.25  # of the budget, up to which they do
TURN_TOKENS = 128  # of one flow before another has its turn: neighbours in a batch share their adapter's products
PRIORITY_BASE = 4.0
_MIN_KEPT = 64  # tenants that are remembered, before any is forgotten


class Scheduler:
    """Bounds each step by tokens and sequences. Owned by the engine thread."""

    def __init__(
        self,
        token_budget: int,
        max_sequences: int,
        weight_of: Callable[[str], float] = lambda _tenant: 1.0,
        decoding: Decoding | None = None,
        beside_tokens: int | None = None,
    ) -> None:
        """Without `decoding` no request may generate. `beside_tokens`: most that a step takes beside sequences that
        generate, None: what the budget leaves.
        """
        self._decoding = decoding
        self._beside_tokens = token_budget if beside_tokens is None else min(beside_tokens, token_budget)
        self._token_budget = token_budget
        self._max_sequences = max_sequences
        self._weight_of = weight_of
        self._tenants: dict[str, TenantFlows] = {}
        self._by_adapter: dict[AdapterId, dict[tuple[str, int], Flow]] = {}
        self._tickets: dict[str, Ticket] = {}
        self._arrivals = 0
        self._num_queued_tokens = 0  # of sequences that are not in a batch yet
        self._floor = 0.0  # the level of those that wait without a credit: it never falls
        self._keep_up_to = _MIN_KEPT  # tenants, until those whose credit is full are forgotten
        self._waiting: frozenset[str] = frozenset()  # tenants that could be served in the last batch

    @property
    def num_queued_tokens(self) -> int:
        return self._num_queued_tokens

    def open_tickets(self) -> list[Ticket]:
        """Requests that have not had their reply, oldest first."""
        return list(self._tickets.values())

    def add(self, request: Request, future: Future[Result], now: float) -> Ticket:
        """Queue a request behind those of its flow that came before it."""
        self._arrivals += 1
        ticket = Ticket(request, future, self._arrivals, now, now)
        if not self._tickets:
            self._floor += TURN_TOKENS + ticket.num_tokens_left
        self._flow_of(ticket).queue.append(ticket)
        self._num_queued_tokens += ticket.num_tokens_left
        self._tickets[request.request_id] = ticket
        return ticket

    def find(self, request_id: str) -> Ticket | None:
        return self._tickets.get(request_id)

    def waiting_for(self, adapter: AdapterId) -> tuple[Ticket, ...]:
        """Requests queued for one adapter, oldest first."""
        flows = self._by_adapter.get(adapter, {}).values()
        return tuple(sorted((t for flow in flows for t in flow.queue if not t.done), key=lambda t: t.arrival))

    def wanted(self) -> Iterable[AdapterId]:
        """Adapters that have requests queued."""
        return tuple(self._by_adapter)

    def waiting_since(self) -> dict[AdapterId, float]:
        """The submission of the oldest request that is queued for each adapter."""
        return {
            adapter: min(flow.queue[0].submitted_at for flow in flows.values())
            for adapter, flows in self._by_adapter.items()
        }

    def finish(self, ticket: Ticket) -> None:
        """Forget a request that has had its terminal reply; one that still waits leaves its queue."""
        ticket.done = True
        self._tickets.pop(ticket.request.request_id, None)
        if ticket.num_left:
            self._num_queued_tokens -= ticket.num_tokens_left
            flow = self._flow_of(ticket)
            flow.queue.remove(ticket)
            self._forget_if_empty(flow)
        if self._decoding is not None:
            self._decoding.drop(ticket)

    def expired(self, now: float) -> list[Ticket]:
        """Requests whose deadline has passed, started or not."""
        deadlines = ((t, t.request.deadline_monotonic) for t in self._tickets.values())
        return [ticket for ticket, deadline in deadlines if deadline is not None and deadline <= now]

    def schedule(self, is_ready: Callable[[AdapterId], bool]) -> list[Work]:
        """Sequences of ready adapters for one batch, up to the budget; at least one if any is ready."""
        chosen = self._next_tokens()
        turns = self._turns(is_ready)
        room = self._token_budget - len(chosen)
        draft = Draft(chosen, is_ready, min(room, self._beside_tokens) if chosen else room)
        others_from = self._token_budget
        if turns and self._num_queued_tokens > self._token_budget and self._is_light(turns[0][2]):
            others_from = int(_FILL * self._token_budget)
        while turns and len(chosen) < self._max_sequences:
            _, _, name, flows = heapq.heappop(turns)
            if draft.num_taken >= others_from and not self._is_light(name):
                break
            tenant = self._tenants[name]
            flow = min(flows, key=lambda flow: flow.rank)
            taken = self._take(flow, draft)
            if not taken and not draft.waits_for_room:
                break  # what is next does not fit: nobody overtakes it, or it would wait for ever
            if taken:
                self._floor = max(self._floor, tenant.served)
                tenant.flow_floor = flow.served
            tenant.served += taken / self._weight_of(name)
            flow.served += taken / PRIORITY_BASE**flow.priority
            if not flow.queue or not taken:
                flows.remove(flow)
                self._forget_if_empty(flow)
            if flows:
                heapq.heappush(turns, self._turn(name, flows))
        return chosen

    def _next_tokens(self) -> list[Work]:
        """One token of each sequence that generates; those that give way are queued again, before all others."""
        if self._decoding is None:
            return []
        work = self._decoding.next_tokens(self._requeue)
        for item in work:
            self._tenants.setdefault(item.ticket.tenant, TenantFlows()).served += 1 / self._weight_of(
                item.ticket.tenant
            )
        return work

    def _requeue(self, ticket: Ticket, num_tokens: int) -> None:
        self._num_queued_tokens += num_tokens
        queue = self._flow_of(ticket).queue
        if ticket not in queue:
            queue.appendleft(ticket)

    def _turns(self, is_ready: Callable[[AdapterId], bool]) -> list[tuple[float, int, str, list[Flow]]]:
        """A heap of the tenants that can be served, the least served first, each with its flows."""
        decoding = self._decoding
        ready = {a for a in self._by_adapter if is_ready(a) or (decoding is not None and decoding.holds(a))}
        able: dict[str, list[Flow]] = {}
        for adapter in ready:
            for flow in self._by_adapter[adapter].values():
                able.setdefault(flow.tenant, []).append(flow)
        for name, flows in able.items():
            if name not in self._waiting:  # its adapter was not ready until now: no credit for that either
                self._lift(name)
            self._lift_flows(self._tenants[name], flows)
        self._waiting = frozenset(able)
        turns = [self._turn(name, flows) for name, flows in able.items()]
        heapq.heapify(turns)
        return turns

    def _lift(self, name: str) -> None:
        """Whoever comes back has a bounded credit, however long it was away."""
        tenant = self._tenants[name]
        tenant.served = max(tenant.served, self._floor - CREDIT_TOKENS / self._weight_of(name))

    def _is_light(self, name: str) -> bool:
        return self._tenants[name].served < self._floor - _LIGHT_TOKENS / self._weight_of(name)

    def _lift_flows(self, tenant: TenantFlows, flows: list[Flow]) -> None:
        stayed = [flow.served for flow in flows if flow.key in tenant.waiting]
        floor = max(tenant.flow_floor, min(stayed)) if stayed else tenant.flow_floor
        for flow in flows:
            if flow.key not in tenant.waiting:
                flow.served = max(flow.served, floor)
        tenant.waiting = frozenset(flow.key for flow in flows)

    def _turn(self, name: str, flows: list[Flow]) -> tuple[float, int, str, list[Flow]]:
        return self._tenants[name].served, min(flow.queue[0].arrival for flow in flows), name, flows

    def _take(self, flow: Flow, draft: Draft) -> int:
        """Take sequences of one flow for a turn, as far as they fit; their tokens."""
        taken = 0
        draft.waits_for_room = False
        for ticket in flow.queue:
            while ticket.num_left and taken < TURN_TOKENS and len(draft.chosen) < self._max_sequences:
                added = self._add(ticket, TURN_TOKENS - taken, draft)
                if not added:
                    break
                taken += added
                draft.num_taken += added
            if ticket.num_left:
                break
        while flow.queue and not flow.queue[0].num_left:
            flow.queue.popleft()
        return taken

    def _add(self, ticket: Ticket, turn: int, draft: Draft) -> int:
        """Have the step take the ticket's next sequence, or a chunk of it; its tokens, 0 if it does not fit."""
        if ticket.request.generation is not None:
            return self._add_chunk(ticket, turn, draft)
        if not draft.is_ready(ticket.adapter):
            draft.waits_for_room = True
            return 0
        work = Work(ticket, ticket.next_sequence)
        if draft.num_taken and work.num_tokens > draft.room:
            return 0
        ticket.next_sequence += 1
        draft.chosen.append(work)
        self._num_queued_tokens -= work.num_tokens
        return work.num_tokens

    def _add_chunk(self, ticket: Ticket, turn: int, draft: Draft) -> int:
        assert self._decoding is not None, "admission refuses requests that cannot generate"
        room = min(turn, draft.room)
        if room <= 0:
            return 0
        is_begun = bool(ticket.pending)
        may_begin = is_begun or (draft.may_begin and draft.is_ready(ticket.adapter))
        num_cached = self._decoding.begin(ticket) if may_begin else None
        if num_cached is None:
            draft.waits_for_room = True
            draft.may_begin = draft.may_begin and not may_begin
            return 0
        one = ticket.pending[0]
        count = min(room, one.num_left)
        if one in draft.chunks:
            self._decoding.extend(draft.chunks[one], count)
        else:
            draft.chunks[one] = self._decoding.chunk(ticket, count)
            draft.chosen.append(draft.chunks[one])
        self._num_queued_tokens -= num_cached + count
        return count

    def _flow_of(self, ticket: Ticket) -> Flow:
        name, request = ticket.tenant, ticket.request
        key = request.adapter, request.priority
        if len(self._tenants) > self._keep_up_to:
            self._forget_idle()
        tenant = self._tenants.setdefault(name, TenantFlows())
        if not tenant.flows:
            self._lift(name)
        if key not in tenant.flows:
            tenant.flows[key] = Flow(name, *key)
        flow = tenant.flows[key]
        self._by_adapter.setdefault(request.adapter, {})[name, request.priority] = flow
        return flow

    def _forget_if_empty(self, flow: Flow) -> None:
        """An idle flow is looked at no more; what its tenant was served counts on."""
        if flow.queue:
            return
        of_adapter = self._by_adapter[flow.adapter]
        of_adapter.pop((flow.tenant, flow.priority), None)
        if not of_adapter:
            del self._by_adapter[flow.adapter]
        tenant = self._tenants[flow.tenant]
        if not any(kept.queue for kept in tenant.flows.values()):
            tenant.flows.clear()
            tenant.flow_floor = 0.0

    def _forget_idle(self) -> None:
        """Of tenants that are away and have all their credit back there is nothing to remember."""
        for name, tenant in list(self._tenants.items()):
            if not tenant.flows and tenant.served <= self._floor - CREDIT_TOKENS / self._weight_of(name):
                del self._tenants[name]
        self._keep_up_to = max(2 * len(self._tenants), _MIN_KEPT)
