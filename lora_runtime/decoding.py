"""The sequences that generate: which blocks of the KV cache they hold, who runs, and who gives way. No torch here.

A continuation begins with blocks for all tokens that it has, is computed chunk by chunk, and then runs: one token in
every step. When a running one needs a block and there is none, the youngest gives its blocks back and waits, with what
it generated, to be computed again: the oldest always goes on, so everything ends. A prompt begins only where blocks
are left for those that run.

A tenant that holds more than its share of the places, or of the blocks, gives way to one that holds less and waits:
its youngest sequences do, its oldest goes on.

The blocks of a prefix are shared by sequences of one tenant and one content of an adapter, told by its digest; of an
aLoRA those before its invocation are the base's. Tenants share none, or one could find out by the time that an answer
takes what another has asked.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_runtime.continuation import Continuation
from lora_runtime.invocation import first_active
from lora_runtime.kv_blocks import BlockPool, BlockStats, KvBlocks, Namespace
from lora_runtime.tickets import Ticket, Work

if TYPE_CHECKING:
    from lora_runtime.batch import Resident
    from lora_runtime.types import AdapterId

Requeue = Callable[[Ticket, int], None]
_SPARE = 4  # running sequences for each block that a new prompt must leave


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """A snapshot for observers."""

    num_running: int  # sequences of which each step draws a token
    num_begun: int  # these, those whose prompts are being computed, and those that gave way
    num_preempted: int  # that gave way, since the engine was made
    blocks: BlockStats


class Holding(Protocol):
    """What keeps adapters in memory: `Residency`."""

    def acquire(self, adapter: AdapterId) -> Resident: ...

    def release(self, adapter: AdapterId) -> None: ...


@dataclass(slots=True)
class _Begun:
    ticket: Ticket
    namespace: Namespace
    num_reserved: int = 0  # places of the other samples, which part from it at the end of the prompt


@dataclass(frozen=True, slots=True)
class _Share:
    """What tenants share: places or blocks."""

    total: int
    wanted: int  # by the one that waits
    size: Callable[[Continuation], int]  # what a sequence that began holds of it
    is_enough: Callable[[], bool]


class Decoding:
    """Owned by the engine's thread."""

    def __init__(self, blocks: KvBlocks, holding: Holding, max_sequences: int, *, reuse_prefixes: bool = True) -> None:
        """`max_sequences`: that have begun and not ended."""
        assert blocks.num_blocks * blocks.block_tokens >= blocks.max_length, "one sequence alone must fit"
        self.pool = BlockPool(blocks.num_blocks, blocks.block_tokens)
        self.max_length = blocks.max_length
        self.num_preempted = 0
        self._holding = holding
        self.max_sequences = max_sequences
        self._reuse_prefixes = reuse_prefixes
        self._running: list[Continuation] = []  # by order
        self._begun: dict[Continuation, _Begun] = {}  # that have not ended
        self._num_salts = 0
        self._refused: Ticket | None = None  # that found no room in the last step; it may be made before the next
        self._broken: list[tuple[Ticket, BaseException]] = []

    def stats(self) -> GenerationStats:
        """Counts of now; safe to ask from any thread."""
        return GenerationStats(len(self._running), len(self._begun), self.num_preempted, self.pool.stats)

    def holds(self, adapter: AdapterId) -> bool:
        """Whether sequences of it have begun: it stays in memory until they end."""
        return any(begun.ticket.adapter == adapter for begun in self._begun.values())

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next step can be planned while one is under way: nobody has to give way."""
        return self._refused is None and self.pool.has_blocks(len(self._running) * self.pool.block_tokens)

    def next_tokens(self, requeue: Requeue) -> list[Work]:
        """One token of each that runs; `requeue` gets the ticket of each that gives way, and the tokens that are to be
        computed again.

        The token of one whose last is part of a step under way is the one that that step draws, unless it ends there.
        """
        self._make_room(requeue)
        work: list[Work] = []
        for one in tuple(self._running):
            is_under_way = one.num_left == 0
            if is_under_way and one.ends_with_next:
                continue
            while one.table is not None and not self.pool.can_append(one.table):
                self._preempt_youngest(requeue)
            if one.table is None:  # the youngest itself, so the last of them
                break
            appended = self.pool.append_slot(one.table, None if is_under_way else one.tokens[-1])
            ticket = self._begun[one].ticket
            work.append(Work(ticket, one.index, one, one.num_scheduled, 1, appended.copy, (one,)))
            one.num_scheduled += 1
        return work

    def begin(self, ticket: Ticket) -> int | None:
        """Take blocks for the next continuation of a ticket, unless it has them; None where it has to wait.

        The tokens of it that the cache had.
        """
        if ticket.pending:
            one = ticket.pending[0]
            if one.table is not None:
                return 0
            namespace = self._begun[one].namespace
            return one.num_scheduled if self._allocate(ticket, one, namespace, num_places=1) else None
        generation = ticket.request.generation
        assert generation is not None and ticket.num_fresh
        prompt = ticket.request.sequences[ticket.next_sequence].input_ids
        if not self._has_place(generation.params.n):
            self._refuse(ticket)
            return None
        resident = self._holding.acquire(ticket.adapter)
        try:
            one = Continuation(generation, prompt, (ticket.arrival, ticket.next_sequence, 0), self.max_length)
        except BaseException as error:  # noqa: BLE001  a tokenizer or a grammar of the request's own, some not in Python
            self._holding.release(ticket.adapter)
            self._broken.append((ticket, error))
            return None
        active = first_active(resident.card, prompt)
        one.num_inactive = self.max_length if active is None else active
        namespace = self._namespace(ticket, resident, one.num_inactive)
        if not self._allocate(ticket, one, namespace, num_places=generation.params.n):
            self._holding.release(ticket.adapter)
            return None
        one.num_cached = one.num_scheduled
        ticket.next_sequence += 1
        ticket.pending.append(one)
        ticket.begun.append(one)
        self._begun[one] = _Begun(ticket, namespace, generation.params.n - 1)
        return one.num_cached

    def take_broken(self) -> list[tuple[Ticket, BaseException]]:
        """Requests that could not begin, and why; each once."""
        broken, self._broken = self._broken, []
        return broken

    def chunk(self, ticket: Ticket, count: int) -> Work:
        """`count` more tokens of the ticket's next continuation, which has begun."""
        one = ticket.pending[0]
        work = Work(ticket, one.index, one, one.num_scheduled, count)
        one.num_scheduled += count
        if not one.num_left:
            ticket.pending.popleft()
            twins = one.twins()
            self._begun[one].num_reserved = 0
            for twin in twins:
                self._holding.acquire(ticket.adapter)
                ticket.begun.append(twin)
                self._begun[twin] = _Begun(ticket, self._begun[one].namespace)
            work.branches = (one, *twins)
        return work

    def extend(self, work: Work, count: int) -> None:
        """Have a chunk of this step take `count` tokens more."""
        more = self.chunk(work.ticket, count)
        assert more.start == work.start + work.count, "chunks of one step follow each other"
        work.count += count
        work.branches = more.branches

    def computed(self, work: Work, now: float) -> None:
        """The keys and values of a step's work are stored, and its branches draw their tokens, at `now`."""
        one = work.continuation
        assert one is not None and one.table is not None
        self.pool.mark_computed(one.table, work.start + work.count)
        for branch in work.branches:
            if branch.table is None:
                branch.table = self.pool.fork(one.table)
            if branch.first_token_at is None:
                branch.first_token_at = now
            if not branch.is_running:
                branch.is_running = True
                insort(self._running, branch, key=_order)

    def drew(self, one: Continuation) -> None:
        """A token of one that goes on is known, which the next step may hold already."""
        assert one.table is not None
        self.pool.name_last(one.table, one.tokens[-1])

    def end(self, one: Continuation) -> None:
        """Give back what a continuation holds."""
        begun = self._begun.pop(one)
        self._stop(one)
        self._holding.release(begun.ticket.adapter)

    def drop(self, ticket: Ticket) -> None:
        """Give back what is left of a ticket that has had its reply."""
        for one in ticket.begun:
            if one in self._begun:
                self.end(one)
        ticket.pending.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless pool, tables and those that have begun agree."""
        self.pool.check_integrity()
        tables = [one.table for one in self._begun if one.table is not None]
        assert self.pool.num_tables == len(tables), "a table has no continuation"
        assert all(one in self._begun and one.table is not None for one in self._running), "one that ended runs"
        assert self._running == sorted(self._running, key=_order), "those that run are out of order"
        assert len(self._running) == sum(one.is_running for one in self._begun), "one that runs is not listed"

    def _preempt_youngest(self, requeue: Requeue) -> None:
        self._preempt(max(self._holders(), key=_order), requeue)

    def _preempt(self, one: Continuation, requeue: Requeue) -> None:
        """Have one that holds blocks give them back; its tokens are computed again later."""
        ticket = self._begun[one].ticket
        num_queued = 0 if one.is_running else one.num_left
        if one.is_running:
            ticket.pending = deque(sorted([*ticket.pending, one], key=_order))
        self._stop(one)
        one.num_scheduled = 0
        self.num_preempted += 1
        requeue(ticket, len(one.tokens) - num_queued)

    def _make_room(self, requeue: Requeue) -> None:
        """For the ticket that found none, where other tenants hold more than their share of what it lacks."""
        ticket, self._refused = self._refused, None
        if ticket is None or ticket.done:
            return
        if ticket.pending:
            num_places, num_tokens = 1, len(ticket.pending[0].tokens)
        else:
            num_places = ticket.request.num_samples
            num_tokens = ticket.request.sequences[ticket.next_sequence].num_tokens
        places = _Share(self.max_sequences, num_places, lambda _: 1, lambda: self._has_place(num_places))
        blocks = _Share(
            self.pool.num_blocks,
            self.pool.num_blocks_for(num_tokens),
            lambda one: 0 if one.table is None else len(one.table.blocks),
            lambda: self.pool.has_blocks(num_tokens, self._spare),
        )
        for share in (places, blocks):
            self._give_way(ticket.tenant, share, requeue)

    def _give_way(self, tenant: str, share: _Share, requeue: Requeue) -> None:
        """Preempt the youngest of those tenants that hold most, until there is enough for one that holds little.

        The oldest of each goes on: a tenant with one long text is waited for.
        """
        of_tenant: dict[str, list[Continuation]] = {tenant: []}
        for one in sorted(self._holders(), key=_order):
            of_tenant.setdefault(self._begun[one].ticket.tenant, []).append(one)
        held = {name: sum(map(share.size, own)) for name, own in of_tenant.items()}
        fair = share.total / len(held)
        if held[tenant] + share.wanted > fair:
            return
        while not share.is_enough():
            able = [name for name, own in of_tenant.items() if name != tenant and len(own) > 1 and held[name] > fair]
            if not able:
                return
            most = max(able, key=held.__getitem__)
            youngest = of_tenant[most].pop()
            held[most] -= share.size(youngest)
            self._preempt(youngest, requeue)

    def _holders(self) -> list[Continuation]:
        return [one for one in self._begun if one.table is not None]

    def _has_place(self, num_places: int) -> bool:
        """Whether so many more sequences may hold blocks at once."""
        taken = sum((one.table is not None) + begun.num_reserved for one, begun in self._begun.items())
        return taken + num_places <= self.max_sequences

    @property
    def _spare(self) -> int:
        """Blocks that a prompt must leave to those that run."""
        return -(-len(self._running) // _SPARE)

    def _stop(self, one: Continuation) -> None:
        if one.is_running:
            one.is_running = False
            self._running.remove(one)
        if one.table is not None:
            self.pool.free(one.table)
            one.table = None

    def _allocate(self, ticket: Ticket, one: Continuation, namespace: Namespace, *, num_places: int) -> bool:
        if not self._has_place(num_places) or not self.pool.can_allocate(namespace, one.tokens, self._spare):
            self._refuse(ticket)
            return False
        one.table = self.pool.allocate(namespace, one.tokens)
        one.num_scheduled = one.table.num_computed
        return True

    def _refuse(self, ticket: Ticket) -> None:
        """Note who finds no room; of a step's the first, whose turn it was before the others'."""
        self._refused = self._refused or ticket

    def _namespace(self, ticket: Ticket, resident: Resident, num_inactive: int) -> Namespace:
        owner = ticket.tenant
        if not self._reuse_prefixes:
            self._num_salts += 1
            owner = f"{owner}/{self._num_salts}"
        own = f"{owner}/" if ticket.adapter.is_base else f"{owner}/{resident.digest}"
        # what an adapter changes beside LoRA it changes for all tokens, those before an invocation too
        return Namespace(own, num_inactive, base=own if resident.extras else f"{owner}/")


def _order(one: Continuation) -> tuple[int, int, int]:
    return one.order
