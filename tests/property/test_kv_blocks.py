"""Any order of sequences, forks, preemptions and replaced adapters leaves the block pool whole.

The model beside it remembers what was last written to every slot: (digest of whoever computed it, all tokens up to
it). A sequence may only ever read slots whose content is its own.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_runtime.errors import CapacityExceeded
from lora_runtime.kv_blocks import (
    BASE_NAMESPACE,
    BlockPool,
    BlockTable,
    Namespace,
)

BLOCK = 4
NUM_BLOCKS = 12
BASE = Namespace()
tokens_of = st.sampled_from([4, 5, 9, 10, 13, 18]).map(lambda count: [0] * count) | st.lists(
    st.integers(0, 1), min_size=1, max_size=18
)
namespaces = st.sampled_from(
    [BASE, Namespace("other"), Namespace("lora"), Namespace("lora", 3), Namespace("lora", 5), Namespace("lora", 6)]
)
Content = tuple[tuple[str, int], ...]


def content(table: BlockTable, position: int) -> Content:
    """What the keys and values at `position` depend on: who computes each token up to it, and the tokens."""
    base = table.namespace.base_tokens
    computed_by = [BASE_NAMESPACE if at < base else table.namespace.digest for at in range(position + 1)]
    return tuple(zip(computed_by, table.tokens[: position + 1], strict=True))


class PoolMachine(RuleBasedStateMachine):
    """Writes to slots as the engine does, and reads every sequence back."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK)
        self.live: list[BlockTable] = []
        self.preempted: list[tuple[Namespace, list[int]]] = []
        self.stored: dict[int, Content] = {}  # slot → what was written

    def compute(self, table: BlockTable, end: int) -> None:
        for position in range(table.num_computed, end):
            self.stored[table.slot(position)] = content(table, position)
        self.pool.mark_computed(table, end)

    def allocate(self, namespace: Namespace, tokens: list[int]) -> BlockTable | None:
        matched, num_matched = self.pool.match_prefix(namespace, tokens)
        before = self.pool.stats
        if not self.pool.can_allocate(namespace, tokens):
            with pytest.raises(CapacityExceeded, match="blocks left"):
                self.pool.allocate(namespace, tokens)
            assert self.pool.stats == before
            return None
        table = self.pool.allocate(namespace, tokens)
        assert table.blocks[: len(matched)] == matched
        assert table.num_computed == num_matched < len(tokens)
        assert self.pool.stats.hit_tokens == before.hit_tokens + num_matched
        assert self.pool.stats.queried_tokens == before.queried_tokens + len(tokens)
        self.live.append(table)
        return table

    def pick(self, data: st.DataObject) -> BlockTable:
        return data.draw(st.sampled_from(self.live))

    @rule(namespace=namespaces, tokens=tokens_of, whole_prompt=st.booleans())
    def begin(self, namespace: Namespace, tokens: list[int], whole_prompt: bool) -> None:
        table = self.allocate(namespace, tokens)
        if table is not None and whole_prompt:
            self.compute(table, len(tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def prefill_chunk(self, data: st.DataObject) -> None:
        table = self.pick(data)
        self.compute(table, data.draw(st.integers(table.num_computed, len(table.tokens))))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def decode(self, data: st.DataObject, tokens: list[int]) -> None:
        table = self.pick(data)
        self.compute(table, len(table.tokens))
        for token in tokens:
            if not self.pool.can_append(table):
                before = list(table.blocks), list(table.tokens)
                with pytest.raises(CapacityExceeded, match="1 are needed"):
                    self.pool.append_slot(table, token)
                assert (table.blocks, table.tokens) == before
                return
            appended = self.pool.append_slot(table, token)
            if appended.copy is not None:
                for offset in range(BLOCK):
                    at = appended.copy.source * BLOCK + offset
                    self.stored[appended.copy.target * BLOCK + offset] = self.stored.get(at, ())
            assert appended.slot == table.slot(len(table.tokens) - 1)
            sharers = [other for other in self.live if appended.slot // BLOCK in other.blocks]
            assert sharers == [table], "a block that others read is written to"
            self.compute(table, len(table.tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = self.pick(data)
        self.compute(table, len(table.tokens))
        before = self.pool.stats
        twin = self.pool.fork(table)
        assert self.pool.stats == before, "a fork takes no block"
        self.live.append(twin)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.pick(data)
        self.live.remove(table)
        self.pool.free(table)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        table = self.pick(data)
        self.live.remove(table)
        namespace, tokens, num_computed = table.namespace, table.tokens, table.num_computed
        self.pool.free(table)
        self.preempted.append((namespace, tokens))
        num_full = min(num_computed, len(tokens) - 1) // BLOCK
        _, num_matched = self.pool.match_prefix(namespace, tokens)
        assert num_matched >= num_full * BLOCK, "a victim's full blocks were not kept"

    @precondition(lambda self: self.preempted)
    @rule()
    def resume(self) -> None:
        namespace, tokens = self.preempted.pop()
        self.allocate(namespace, tokens)

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity()
        for table in self.live:
            for position in range(table.num_computed):
                assert self.stored[table.slot(position)] == content(table, position)

    @invariant()
    def shared_blocks_are_equal(self) -> None:
        for at, one in enumerate(self.live):
            for other in self.live[at + 1 :]:
                for shared in set(one.blocks) & set(other.blocks):
                    mine, theirs = one.blocks.index(shared), other.blocks.index(shared)
                    end = min((mine + 1) * BLOCK, len(one.tokens), len(other.tokens))
                    assert mine == theirs
                    assert content(one, end - 1) == content(other, end - 1)

    def teardown(self) -> None:
        for table in self.live:
            self.pool.free(table)
        self.pool.check_integrity()
        assert self.pool.stats.num_used == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def computed(pool: BlockPool, namespace: Namespace, tokens: list[int]) -> BlockTable:
    table = pool.allocate(namespace, tokens)
    pool.mark_computed(table, len(tokens))
    return table


def test_an_equal_prompt_reuses_all_but_its_last_token() -> None:
    pool = BlockPool(8, BLOCK)
    first = computed(pool, BASE, list(range(9)))
    assert pool.match_prefix(BASE, list(range(9))) == (first.blocks[:2], 8)
    assert pool.match_prefix(BASE, list(range(8))) == (first.blocks[:1], 4), "the last token must be computed"
    assert pool.match_prefix(BASE, [*range(7), 0, 8]) == (first.blocks[:1], 4)
    assert pool.match_prefix(Namespace("lora"), list(range(9))) == ([], 0)


def test_blocks_before_an_invocation_are_the_bases() -> None:
    pool = BlockPool(16, BLOCK)
    tokens = list(range(13))
    base = computed(pool, BASE, tokens)
    assert pool.match_prefix(Namespace("alora", base_tokens=9), tokens) == (base.blocks[:2], 8)
    assert pool.match_prefix(Namespace("alora", base_tokens=7), tokens) == (base.blocks[:1], 4)
    activated = computed(pool, Namespace("alora", base_tokens=9), tokens)
    assert activated.blocks[:2] == base.blocks[:2]
    assert activated.blocks[2] != base.blocks[2]
    assert pool.match_prefix(Namespace("alora", base_tokens=9), tokens) == (activated.blocks[:3], 12)


def test_a_block_that_an_invocation_divides_is_found_only_where_it_divides_it_there() -> None:
    pool = BlockPool(16, BLOCK)
    tokens = list(range(9))
    computed(pool, Namespace("alora", base_tokens=6), tokens)
    assert pool.match_prefix(Namespace("alora", base_tokens=5), tokens)[1] == 4
    assert pool.match_prefix(Namespace("alora", base_tokens=6), tokens)[1] == 8
    assert pool.match_prefix(Namespace("alora", base_tokens=4), tokens)[1] == 4


def test_what_is_not_computed_is_not_found() -> None:
    pool = BlockPool(8, BLOCK)
    table = pool.allocate(BASE, list(range(12)))
    assert pool.match_prefix(BASE, list(range(12))) == ([], 0)
    pool.mark_computed(table, 7)
    assert pool.match_prefix(BASE, list(range(12))) == (table.blocks[:1], 4)


def test_the_least_recently_used_prefix_makes_room_first_and_its_end_before_its_start() -> None:
    pool = BlockPool(5, BLOCK)
    old, recent = [0] * 8 + [9], [1] * 8 + [9]
    for tokens in (recent, old, recent):
        pool.free(computed(pool, BASE, tokens))
    assert pool.stats.num_cached == 4
    pool.allocate(BASE, [2] * 8)
    assert pool.match_prefix(BASE, old)[1] == 4
    assert pool.match_prefix(BASE, recent)[1] == 8
    assert pool.stats.evictions == 1


def test_a_shared_last_block_is_copied_once() -> None:
    pool = BlockPool(8, BLOCK)
    first = computed(pool, BASE, [1, 2, 3, 4, 5])
    samples = [pool.fork(first), pool.fork(first)]
    copies = [pool.append_slot(table, 7).copy for table in (*samples, first)]
    assert [copy is None for copy in copies] == [False, False, True], "the last of them owns the block alone"
    assert len({table.blocks[1] for table in (*samples, first)}) == 3
    assert len({table.blocks[0] for table in (*samples, first)}) == 1


def test_a_growing_sequence_takes_the_neighbour_of_its_last_block() -> None:
    pool = BlockPool(8, BLOCK)
    table = pool.allocate(BASE, [0] * 9)
    assert table.blocks == [0, 1, 2]
    for _ in range(8):
        pool.append_slot(table, 0)
    assert table.blocks == [0, 1, 2, 3, 4]


def test_integrity_notices_a_lost_reference_and_a_lost_key() -> None:
    pool = BlockPool(8, BLOCK)
    table = computed(pool, BASE, [0] * 9)
    pool._refs[table.blocks[0]] += 1  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity()
    pool._refs[table.blocks[0]] -= 1  # pyright: ignore[reportPrivateUsage]
    del pool._key_of[table.blocks[0]]  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(AssertionError, match="keys and blocks differ"):
        pool.check_integrity()


def test_base_blocks_are_shared_among_those_that_give_the_base_one_name() -> None:
    pool = BlockPool(16, BLOCK)
    tokens = list(range(9))
    base = computed(pool, Namespace("a/", base="a/"), tokens)
    assert pool.match_prefix(Namespace("a/alora", 8, base="a/"), tokens) == (base.blocks[:2], 8)
    assert pool.match_prefix(Namespace("b/alora", 8, base="b/"), tokens) == ([], 0)
    assert pool.match_prefix(Namespace("b/", base="b/"), tokens) == ([], 0)
