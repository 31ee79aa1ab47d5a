"""Any mix of tenants, arrivals, loads, cancels and batches: nothing lost, nothing twice, budgets held, flows in order,
and between two tenants that both wait the served tokens per weight differ by a bounded amount."""

from __future__ import annotations

from concurrent.futures import Future

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_runtime.scheduler import Scheduler
from lora_runtime.tickets import Ticket
from lora_runtime.types import AdapterId, Classification, Request, Task, TokenSequence

BUDGET, MAX_SEQUENCES = 50, 6
ADAPTERS = [AdapterId("default", f"a{i}", 1) for i in range(4)]
WEIGHTS = {"heavy": 4.0, "light": 1.0, "other": 2.0}


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(BUDGET, MAX_SEQUENCES, WEIGHTS.__getitem__)
        self.ready: set[AdapterId] = set()
        self.tickets: dict[int, Ticket] = {}
        self.left: dict[int, list[int]] = {}  # arrival → sequences not yet scheduled
        self.now = 0.0

    @rule(
        adapter=st.sampled_from(ADAPTERS),
        tenant=st.sampled_from(sorted(WEIGHTS)),
        priority=st.integers(0, 2),
        lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=9),
    )
    def arrive(self, adapter: AdapterId, tenant: str, priority: int, lengths: list[int]) -> None:
        self.now += 1
        sequences = tuple(TokenSequence((1,) * n, None) for n in lengths)
        request = Request(
            f"r{self.now}",
            adapter,
            Task.CLASSIFY,
            sequences,
            deadline_monotonic=self.now + 20,
            tenant=tenant,
            priority=priority,
        )
        ticket = self.scheduler.add(request, Future(), self.now)
        self.tickets[ticket.arrival] = ticket
        self.left[ticket.arrival] = list(range(len(lengths)))

    @rule(adapter=st.sampled_from(ADAPTERS))
    def toggle(self, adapter: AdapterId) -> None:
        self.ready ^= {adapter}

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.forget(data.draw(st.sampled_from(sorted(self.tickets))))

    @rule()
    def expire(self) -> None:
        self.now += 1
        due = {t.arrival for t in self.tickets.values() if t.submitted_at + 20 <= self.now}
        assert {ticket.arrival for ticket in self.scheduler.expired(self.now)} == due
        for arrival in due:
            self.forget(arrival)

    @rule()
    def batch(self) -> None:
        servable = sorted(a for a, left in self.left.items() if left and self.tickets[a].adapter in self.ready)
        work = self.scheduler.schedule(lambda adapter: adapter in self.ready)
        assert bool(work) == bool(servable), "a servable request was passed over, or one was made up"
        assert len(work) <= MAX_SEQUENCES
        assert sum(item.num_tokens for item in work) <= BUDGET
        for item in work:
            assert item.ticket.adapter in self.ready
            older = [a for a in servable if a < item.ticket.arrival and self.left[a]]
            assert not any(same_flow(self.tickets[a], item.ticket) for a in older), "a request overtook in its flow"
            assert self.left[item.ticket.arrival].pop(0) == item.index, "a sequence was skipped or answered twice"
            item.ticket.outputs[item.index] = Classification((), ())
        for arrival in [a for a, left in self.left.items() if not left]:
            assert len(self.tickets[arrival].outputs) == len(self.tickets[arrival].request.sequences)
            self.forget(arrival)

    @invariant()
    def nothing_lost(self) -> None:
        assert {t.arrival for t in self.scheduler.open_tickets()} == set(self.tickets)
        waiting = {t.arrival for a in ADAPTERS for t in self.scheduler.waiting_for(a) if t.num_left}
        assert waiting == {a for a, left in self.left.items() if left}, (
            "a queue keeps what has gone, or lost what waits"
        )

    def forget(self, arrival: int) -> None:
        self.scheduler.finish(self.tickets.pop(arrival))
        del self.left[arrival]

    def teardown(self) -> None:
        self.ready = set(ADAPTERS)
        for _ in range(200):
            if not self.tickets:
                break
            self.batch()
        assert not self.tickets, "requests wait for ever although every adapter is ready"


def same_flow(one: Ticket, other: Ticket) -> bool:
    a, b = one.request, other.request
    return (a.tenant, a.adapter, a.priority) == (b.tenant, b.adapter, b.priority)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
