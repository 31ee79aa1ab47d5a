"""What the engine keeps of an admitted request, and what a step does for it. No torch here."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from lora_runtime.continuation import Continuation
from lora_runtime.generation import Generated
from lora_runtime.kv_blocks import BlockCopy
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
    pending: deque[Continuation] = field(default_factory=deque[Continuation])  # begun, with tokens to compute
    begun: list[Continuation] = field(default_factory=list[Continuation])  # all of a GENERATE request, ended ones too

    @property
    def adapter(self) -> AdapterId:
        return self.request.adapter

    @property
    def tenant(self) -> str:
        """Who is charged for it."""
        return self.request.tenant or self.adapter.tenant

    @property
    def num_fresh(self) -> int:
        """Sequences that have not begun."""
        return len(self.request.sequences) - self.next_sequence

    @property
    def num_left(self) -> int:
        """Sequences that wait for a step: those that have not begun, and those with tokens to compute."""
        return self.num_fresh + len(self.pending)

    @property
    def num_tokens_left(self) -> int:
        fresh = sum(sequence.num_tokens for sequence in self.request.sequences[self.next_sequence :])
        return fresh + sum(continuation.num_left for continuation in self.pending)

    def generated(self, index: int) -> Generated | None:
        """What became of one of its sequences, None until all samples of it have ended."""
        own = sorted((one for one in self.begun if one.index == index), key=lambda one: one.order)
        samples = tuple(one.result for one in own if one.result is not None)
        if not own or len(samples) < len(own):
            return None
        first = own[0]
        assert first.first_token_at is not None
        return Generated(samples, first.num_cached, first.first_token_at - self.submitted_at)


@dataclass(slots=True, eq=False)
class Work:
    """What the next step does of one sequence: all of it, or of a continuation `count` tokens from `start` on."""

    ticket: Ticket
    index: int
    continuation: Continuation | None = None
    start: int = 0
    count: int = 0
    copy: BlockCopy | None = None  # of a block that was shared, before anything is written
    branches: tuple[Continuation, ...] = ()  # whose next token the step draws

    @property
    def num_tokens(self) -> int:
        return self.count if self.continuation is not None else self.ticket.request.sequences[self.index].num_tokens
