"""Any mix of prompts, samples, cancels, adapters that come and go, and a cache that is too small: every request ends,
each token is computed in its turn, budgets hold, and at the end every block and every adapter is given back.

With steps in turn, and with each step planned before the one before it has landed."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lora_runtime.continuation import Continuation
from lora_runtime.decoding import Decoding
from lora_runtime.generation import Generation
from lora_runtime.kv_blocks import KvBlocks
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.scheduler import Scheduler
from lora_runtime.tickets import Ticket, Work
from lora_runtime.types import AdapterCard, AdapterId, ProblemType, Request, Task, TokenSequence

BUDGET, MAX_SEQUENCES, MAX_BEGUN = 12, 8, 5
BLOCK, NUM_BLOCKS, MAX_LENGTH = 4, 7, 24
END = 100  # tokens from which on are drawn
ADAPTERS = [AdapterId("default", name, 1) for name in ("a0", "a1", "alora")]
CARD = AdapterCard(Task.GENERATE, None, ProblemType.SINGLE_LABEL, None, None, None)


@dataclass(frozen=True)
class FakeResident:
    digest: str
    card: AdapterCard
    extras: tuple[()] = ()


class FakeResidency:
    """Counts who holds what."""

    def __init__(self) -> None:
        self.held: Counter[AdapterId] = Counter()

    def acquire(self, adapter: AdapterId) -> Any:
        self.held[adapter] += 1
        return FakeResident(adapter.name, replace(CARD, invocation_tokens=(1, 1) if adapter.name == "alora" else None))

    def release(self, adapter: AdapterId) -> None:
        self.held[adapter] -= 1
        assert self.held[adapter] >= 0


class NoText:
    def append(self, token_id: int) -> str:
        return f"{token_id},"

    def flush(self) -> str:
        return ""


class DecodingMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.residency = FakeResidency()
        self.decoding = Decoding(KvBlocks(NUM_BLOCKS, BLOCK, MAX_LENGTH), self.residency, MAX_BEGUN)
        self.scheduler = Scheduler(BUDGET, MAX_SEQUENCES, decoding=self.decoding)
        self.ready: set[AdapterId] = set(ADAPTERS)
        self.tickets: dict[str, Ticket] = {}
        self.stored: dict[int, tuple[str, tuple[int, ...]]] = {}  # slot → by whom, and the tokens up to it
        self.count = 0
        self.ahead = False
        self.flight: list[Work] = []

    @initialize(ahead=st.booleans())
    def begin(self, ahead: bool) -> None:
        self.ahead = ahead

    @rule(
        adapter=st.sampled_from(ADAPTERS),
        tenant=st.sampled_from(["t0", "t1"]),
        prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=3),
        samples=st.integers(1, 3),
        num_new=st.integers(1, 9),
        ends_at=st.integers(2, MAX_LENGTH),
    )
    def arrive(
        self, adapter: AdapterId, tenant: str, prompts: list[list[int]], samples: int, num_new: int, ends_at: int
    ) -> None:
        params = SamplingParams(max_new_tokens=num_new, n=samples, temperature=1.0, seed=self.count)
        sequences = tuple(TokenSequence(tuple(prompt), None) for prompt in prompts)
        generation = Generation(params, NoText, frozenset({END + ends_at}))
        self.add(adapter, tenant, sequences, Task.GENERATE, generation)

    @rule(adapter=st.sampled_from(ADAPTERS), tenant=st.sampled_from(["t0", "t1"]), length=st.integers(1, BUDGET + 3))
    def classify(self, adapter: AdapterId, tenant: str, length: int) -> None:
        self.add(adapter, tenant, (TokenSequence((1,) * length, None),), Task.CLASSIFY, None)

    def add(
        self,
        adapter: AdapterId,
        tenant: str,
        sequences: tuple[TokenSequence, ...],
        task: Task,
        generation: Generation | None,
    ) -> None:
        self.count += 1
        name = f"r{self.count}"
        request = Request(name, adapter, task, sequences, tenant=tenant, generation=generation)
        self.tickets[name] = self.scheduler.add(request, Future(), float(self.count))

    @rule(adapter=st.sampled_from(ADAPTERS))
    def toggle(self, adapter: AdapterId) -> None:
        self.ready ^= {adapter}

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tickets)))
        self.scheduler.finish(self.tickets.pop(name))

    @rule()
    def step(self) -> None:
        if self.flight and not self.decoding.can_run_ahead:
            self.land()
        holding = [one for t in self.tickets.values() for one in t.begun if one.table is not None]
        oldest = min(holding, key=lambda one: one.order, default=None)
        oldest = oldest if oldest is not None and oldest.is_running and not self.ahead else None
        before = len(oldest.tokens) if oldest is not None else 0
        work = self.scheduler.schedule(lambda adapter: adapter in self.ready)
        chunks = [item for item in work if not is_decode(item)]
        decodes = len(work) - len(chunks)
        room = max(BUDGET - decodes, 0)
        alone = len(chunks) == 1 and chunks[0].continuation is None  # one longer than the budget runs by itself
        assert sum(item.num_tokens for item in chunks) <= room or alone
        assert len({id(item.continuation) for item in work if item.continuation}) == sum(
            item.continuation is not None for item in work
        ), "a continuation is twice in one step"
        for item in work:
            if item.copy is not None:
                for offset in range(BLOCK):
                    at, to = item.copy.source * BLOCK + offset, item.copy.target * BLOCK + offset
                    if at in self.stored:
                        self.stored[to] = self.stored[at]
        for item in work:
            self.compute(item)
        self.land()
        self.flight = work
        if not self.ahead:
            self.land()
        if oldest is not None:
            assert oldest.result is not None or len(oldest.tokens) == before + 1, "the oldest did not go on"

    def compute(self, item: Work) -> None:
        one, generation = item.continuation, item.ticket.request.generation
        if one is None:
            return
        assert one.table is not None and generation is not None
        if item.start == len(one.tokens):
            num_new = item.start + 1 - one.num_prompt
            most = min(MAX_LENGTH - one.num_prompt, generation.params.max_new_tokens)
            assert self.ahead and num_new < most, "a token is computed that nobody needs"
        for position in range(item.start, item.start + item.count):
            self.stored[one.table.slot(position)] = content(item.ticket, one, position)
        for position in range(item.start + item.count):
            assert self.stored[one.table.slot(position)] == content(item.ticket, one, position), "another's past"

    def land(self) -> None:
        """What ended after the step was planned is dropped."""
        work, self.flight = self.flight, []
        for item in work:
            one = item.continuation
            if item.ticket.done or (one is not None and one.result is not None):
                continue
            if one is None:
                item.ticket.outputs[item.index] = object()  # pyright: ignore[reportArgumentType]
                continue
            self.draw(item)
        for name, ticket in list(self.tickets.items()):
            if len(ticket.outputs) == len(ticket.request.sequences):
                self.scheduler.finish(self.tickets.pop(name))

    def draw(self, item: Work) -> None:
        self.decoding.computed(item, 1.0)
        for branch in item.branches:
            assert branch.num_left <= 0
            branch.take(SampledToken(next_token(branch)))
            if branch.result is None:
                self.decoding.drew(branch)
                continue
            self.decoding.end(branch)
            generated = item.ticket.generated(item.index)
            if generated is not None:
                assert item.ticket.request.generation is not None
                assert len(generated.samples) == item.ticket.request.generation.params.n
                ends = {sample.finish_reason for sample in generated.samples}
                assert ends <= {FinishReason.LENGTH, FinishReason.EOS}
                item.ticket.outputs[item.index] = generated

    @invariant()
    def whole(self) -> None:
        self.decoding.check_integrity()
        assert {t.request.request_id for t in self.scheduler.open_tickets()} == set(self.tickets)
        begun = Counter(t.adapter for t in self.tickets.values() for one in t.begun if one.result is None)
        assert +self.residency.held == begun, "an adapter is held by nobody, or not held by one that goes on"
        queued = sum(ticket.num_tokens_left for ticket in self.tickets.values())
        assert self.scheduler._num_queued_tokens == queued  # pyright: ignore[reportPrivateUsage]

    def teardown(self) -> None:
        self.ready = set(ADAPTERS)
        for _ in range(2000):
            if not self.tickets:
                break
            self.step()
            self.whole()
        self.land()
        assert not self.tickets, "requests wait for ever"
        assert not self.decoding.stats().num_begun and not self.decoding.stats().blocks.num_used


def is_decode(item: Work) -> bool:
    return item.continuation is not None and item.start >= item.continuation.num_prompt


def content(ticket: Ticket, one: Continuation, position: int) -> tuple[str, tuple[int, ...]]:
    """What the keys and values at a position depend on."""
    by = "base" if position < one.num_inactive else ticket.adapter.name
    tokens = [*one.tokens, next_token(one)]  # the last is drawn by the step before
    assert position < len(tokens)
    return f"{ticket.tenant}/{by}/{min(position + 1, one.num_inactive)}", tuple(tokens[: position + 1])


def next_token(one: Continuation) -> int:
    """What it draws after its tokens: one that some requests end with, another for each length."""
    return END + len(one.tokens)


TestDecoding = DecodingMachine.TestCase
TestDecoding.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
