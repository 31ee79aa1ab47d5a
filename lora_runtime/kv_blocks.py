"""Which block of the KV cache holds which tokens: reference counts, prefix caching and copy on write.

`BlockPool` hands out fixed-size blocks of a byte budget; the keys and values themselves lie in `model.kv_cache`. A
sequence has a `BlockTable`. Verbs: `can_allocate`/`allocate` a prompt, `can_append`/`append_slot` one token, `fork` a
sample, `mark_computed` after a step, `free` at the end or for preemption. All belong to the engine thread.

Prefix caching: a full, computed block has the key `SHA-256(namespace, parent's key, tokens)`, so that equal keys mean
equal tokens and adapters from the first token on; where an aLoRA's invocation divides a block, the key says where. The
digest is cryptographic and has 256 bits; a collision is not a case that is handled. The namespace is the content
digest of the adapter that computed the block, "" for the base, so two adapters never share a block. Blocks that nobody
uses keep their key in an order of last use until the room is needed. Source of the scheme: vLLM, "Automatic Prefix
Caching".
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from lora_runtime.errors import CapacityExceeded

BASE_NAMESPACE = ""
_ROOT = bytes(32)  # the parent's key of a first block


@dataclass(frozen=True, slots=True)
class KvConfig:
    """The shape of one token's keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    itemsize: int  # bytes of an element

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize


def block_bytes(config: KvConfig, block_tokens: int) -> int:
    """Bytes of one block: keys and values of `block_tokens` tokens in all layers."""
    return config.token_bytes * block_tokens


@dataclass(frozen=True, slots=True)
class KvBlocks:
    """The KV cache as the engine needs to know it."""

    num_blocks: int
    block_tokens: int
    max_length: int  # tokens of one sequence, prompt and text together


@dataclass(frozen=True, slots=True)
class Namespace:
    """Whose keys and values a sequence's blocks hold.

    `base_tokens`: how many of its first tokens the base alone computes, as before the invocation of an aLoRA. Blocks
    wholly among them are shared with the base and with every such adapter.
    """

    digest: str = BASE_NAMESPACE
    base_tokens: int = 0
    base: str = BASE_NAMESPACE  # the base's name here: blocks are shared among those that give it the same one

    def of_block(self, end: int) -> str:
        """The digest under which the block whose last token is `end - 1` is kept."""
        return self.base if end <= self.base_tokens else self.digest


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Keys and values of all layers to copy before anything is written to `target`."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Appended:
    """Where a token's keys and values go, and what must be copied first because its block was shared."""

    slot: int
    copy: BlockCopy | None


@dataclass(frozen=True, slots=True)
class BlockStats:
    """A snapshot; blocks are counted once each, tokens and evictions since the pool was made."""

    num_total: int
    num_used: int
    num_cached: int  # of nobody, kept for their prefix
    num_free: int
    hit_tokens: int
    queried_tokens: int
    evictions: int


class BlockTable:
    """One sequence's blocks in order. Only the pool changes it."""

    def __init__(self, namespace: Namespace, tokens: Sequence[int], block_tokens: int) -> None:
        self.namespace = namespace
        self.tokens = list(tokens)
        self.block_tokens = block_tokens
        self.blocks: list[int] = []
        self.keys: list[bytes] = []  # of its full computed blocks
        self.num_computed = 0  # tokens whose keys and values are stored
        self.last_is_known = True  # which token its last one is

    def slot(self, position: int) -> int:
        """Where token `position` lies: block · block_tokens + offset."""
        block, offset = divmod(position, self.block_tokens)
        return self.blocks[block] * self.block_tokens + offset


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens; every one is free, cached or used, never two of these."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        assert num_blocks > 0 and block_tokens > 0, f"{num_blocks} blocks of {block_tokens} tokens hold nothing"
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free: dict[int, None] = dict.fromkeys(range(num_blocks - 1, -1, -1))  # taken from its end
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached and of nobody, least recently used first
        self._refs = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}  # key → block
        self._key_of: dict[int, bytes] = {}
        self._tables: dict[int, BlockTable] = {}  # by id()
        self._hit_tokens = self._queried_tokens = self._evictions = 0

    @property
    def stats(self) -> BlockStats:
        """Counts of now."""
        num_free, num_cached = len(self._free), len(self._unused)
        return BlockStats(
            num_total=self.num_blocks,
            num_used=self.num_blocks - num_free - num_cached,
            num_cached=num_cached,
            num_free=num_free,
            hit_tokens=self._hit_tokens,
            queried_tokens=self._queried_tokens,
            evictions=self._evictions,
        )

    def match_prefix(self, namespace: Namespace, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The cached blocks of the longest known prefix, and its tokens; takes nothing.

        Never all tokens: the last one must be computed, since its output gives the next.
        """
        blocks: list[int] = []
        for key in self._keys(namespace, tokens, (len(tokens) - 1) // self.block_tokens):
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks, len(blocks) * self.block_tokens

    @property
    def num_tables(self) -> int:
        """Sequences that hold blocks."""
        return len(self._tables)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-num_tokens // self.block_tokens)

    def has_blocks(self, num_tokens: int, spare: int = 0) -> bool:
        """Whether so many tokens find room beside those that sequences hold, none of which they share."""
        return self.num_blocks_for(num_tokens) + spare <= len(self._free) + len(self._unused)

    def can_allocate(self, namespace: Namespace, tokens: Sequence[int], spare: int = 0) -> bool:
        """Whether `allocate` would succeed now and leave `spare` blocks."""
        matched, _ = self.match_prefix(namespace, tokens)
        return self._can_take(matched, len(tokens), spare)

    def allocate(self, namespace: Namespace, tokens: Sequence[int]) -> BlockTable:
        """Blocks for all of `tokens`; the first `num_computed` of them are in the cache already.

        Raises CapacityExceeded, and takes nothing, when there is no room.
        """
        assert tokens, "a sequence has at least one token"
        matched, num_matched = self.match_prefix(namespace, tokens)
        if not self._can_take(matched, len(tokens)):
            raise self._exceeded(self.num_blocks_for(len(tokens)) - len(matched))
        table = BlockTable(namespace, tokens, self.block_tokens)
        for block in matched:
            self._hold(block)
        table.blocks.extend(matched)
        table.keys.extend(self._key_of[block] for block in matched)
        table.num_computed = num_matched
        while len(table.blocks) < self.num_blocks_for(len(tokens)):
            self._grow(table)
        self._queried_tokens += len(tokens)
        self._hit_tokens += num_matched
        self._tables[id(table)] = table
        return table

    def can_append(self, table: BlockTable) -> bool:
        """Whether `append_slot` would succeed now."""
        return not self._needs_block(table) or bool(self._free or self._unused)

    def append_slot(self, table: BlockTable, token: int | None) -> Appended:
        """Room for one more token; a shared last block is replaced by a copy of its own.

        `token` None: it is not known yet, see `name_last`. Raises CapacityExceeded, and changes nothing, when a block
        is needed and there is none.
        """
        assert id(table) in self._tables, "the table was freed"
        assert table.last_is_known, "a token follows one that nobody knows"
        if not self.can_append(table):
            raise self._exceeded(1)
        copy = None
        if len(table.tokens) % self.block_tokens == 0:
            self._grow(table)
        elif self._refs[table.blocks[-1]] > 1:
            shared = table.blocks.pop()
            self._grow(table)
            self._release(shared)
            copy = BlockCopy(shared, table.blocks[-1])
        table.last_is_known = token is not None
        table.tokens.append(0 if token is None else token)
        return Appended(table.slot(len(table.tokens) - 1), copy)

    def name_last(self, table: BlockTable, token: int) -> None:
        """Which token the last one is, where that was not known."""
        if not table.last_is_known:
            table.last_is_known, table.tokens[-1] = True, token

    def fork(self, table: BlockTable) -> BlockTable:
        """A second sequence with the same past; takes no block. All tokens must be computed."""
        assert id(table) in self._tables, "the table was freed"
        assert table.num_computed == len(table.tokens), "a sequence is forked when its tokens are computed"
        twin = BlockTable(table.namespace, table.tokens, self.block_tokens)
        twin.blocks.extend(table.blocks)
        twin.keys.extend(table.keys)
        twin.num_computed = table.num_computed
        for block in twin.blocks:
            self._hold(block)
        self._tables[id(twin)] = twin
        return twin

    def mark_computed(self, table: BlockTable, num_tokens: int) -> None:
        """The first `num_tokens` tokens are stored now: full blocks among them can be found by others."""
        assert id(table) in self._tables, "the table was freed"
        num_known = len(table.tokens) - (not table.last_is_known)
        assert table.num_computed <= num_tokens <= num_known, f"{num_tokens} tokens were not allocated in turn"
        table.num_computed = num_tokens
        num_full = num_tokens // self.block_tokens
        if num_full == len(table.keys):
            return
        table.keys.extend(self._keys(table.namespace, table.tokens, num_full, table.keys))
        self._publish(table)

    def free(self, table: BlockTable) -> None:
        """Give a sequence's blocks back; full computed ones stay cached, the last ones are the first to go.

        After preemption, `allocate` of the same tokens finds what is still cached.
        """
        assert self._tables.pop(id(table), None) is table, "the table was freed"
        self._publish(table)  # where an equal block was found instead of its own and has gone since
        for block in reversed(table.blocks):
            self._release(block)
        table.blocks.clear()
        table.keys.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, counts, tables and keys agree."""
        held = list(chain.from_iterable(table.blocks for table in self._tables.values()))
        used = set(held)
        assert not used & self._free.keys() and not used & self._unused.keys(), "a used block is free or cached"
        assert not self._free.keys() & self._unused.keys(), "a block is both free and cached"
        assert len(used) + len(self._free) + len(self._unused) == self.num_blocks, "a block was lost"
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += 1
        assert counts == self._refs, "reference counts differ from the tables"
        for table in self._tables.values():
            assert len(table.blocks) == self.num_blocks_for(len(table.tokens)), "a table has blocks too many or too few"
            assert len(set(table.blocks)) == len(table.blocks), "a block is twice in one table"
        self._check_keys()

    def _check_keys(self) -> None:
        assert self._unused.keys() <= self._key_of.keys(), "a cached block has no key"
        assert not self._free.keys() & self._key_of.keys(), "a free block has a key"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "keys and blocks differ"
        assert len(self._block_of) == len(self._key_of), "a block has two keys"

    def _keys(
        self, namespace: Namespace, tokens: Sequence[int], num_blocks: int, known: Sequence[bytes] = ()
    ) -> Iterator[bytes]:
        """Of the blocks after those whose keys are known, up to `num_blocks`."""
        parent = known[-1] if known else _ROOT
        for at in range(len(known), num_blocks):
            end = (at + 1) * self.block_tokens
            block = tokens[end - self.block_tokens : end]
            num_base = min(max(namespace.base_tokens - end + self.block_tokens, 0), self.block_tokens)
            parent = _key(namespace.of_block(end), num_base % self.block_tokens, parent, block)
            yield parent

    def _can_take(self, matched: Sequence[int], num_tokens: int, spare: int = 0) -> bool:
        num_unused = len(self._unused) - sum(self._refs[block] == 0 for block in matched)
        return self.num_blocks_for(num_tokens) - len(matched) + spare <= len(self._free) + num_unused

    def _needs_block(self, table: BlockTable) -> bool:
        return len(table.tokens) % self.block_tokens == 0 or self._refs[table.blocks[-1]] > 1

    def _publish(self, table: BlockTable) -> None:
        """Let others find the table's blocks whose keys are known, unless they find equal ones."""
        for key, block in zip(table.keys, table.blocks, strict=False):
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key

    def _grow(self, table: BlockTable) -> None:
        """One more block, the neighbour of the last if it is free: attention reads neighbours in one go."""
        after = table.blocks[-1] + 1 if table.blocks else -1
        if after in self._free:
            block = after
            del self._free[block]
        elif self._free:
            block, _ = self._free.popitem()
        else:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
            self._evictions += 1
        self._refs[block] = 1
        table.blocks.append(block)

    def _hold(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._unused[block]
        self._refs[block] += 1

    def _release(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            (self._unused if block in self._key_of else self._free)[block] = None

    def _forget(self, block: int) -> None:
        """Take the block's key away."""
        del self._block_of[self._key_of.pop(block)]

    def _exceeded(self, num_needed: int) -> CapacityExceeded:
        num_left = len(self._free) + len(self._unused)
        return CapacityExceeded(
            f"the KV cache has {num_left} of {self.num_blocks} blocks left and {num_needed} are needed; wait for a "
            "sequence to end, or give it more bytes",
            needed_blocks=num_needed,
            free_blocks=num_left,
        )


def _key(digest: str, num_base: int, parent: bytes, tokens: Sequence[int]) -> bytes:
    """`num_base`: how many of a divided block's tokens the base computes; 0 where one of the two computes all."""
    name = digest.encode()
    found = hashlib.sha256(array("q", (len(name), num_base)).tobytes() + name + parent)
    found.update(array("q", tokens).tobytes())
    return found.digest()
