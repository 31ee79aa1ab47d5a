"""One step's sequences packed without padding, and the context that the wrapped modules read during the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn

from lora_runtime.arena import BASE_SLOT, SlotTable
from lora_runtime.invocation import first_active
from lora_runtime.kernels.grouped_lora import GroupedLora, GroupLora, LoraPlan
from lora_runtime.packing import InputBuffer, Unpacked, pack_inputs
from lora_runtime.sampling.row import RowState
from lora_runtime.types import AdapterCard, Pooling, ProblemType, SiteGroup, Task, TokenSequence


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """What an adapter changes at one module beside LoRA. Rows of no such adapter are not touched.

    A linear site: `y = gain * y + shift`, after its low-rank delta. An embedding: the row of a token is
    `gain * (table[id] + embed_a[id] @ embed_b)`, with the rows of `row_ids` taken from `rows`. Any module: `params`
    replace its parameters of the same names, and it runs again on the adapter's rows.
    """

    params: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    gain: torch.Tensor | None = None  # [d_out]: DoRA's magnitude over norm
    shift: torch.Tensor | None = None  # [d_out]: biases of LoRA and replaced biases, as a difference
    embed_a: torch.Tensor | None = None  # [rows of the table, rank]
    embed_b: torch.Tensor | None = None  # [rank, d], scaling and embed_scale multiplied in
    row_ids: torch.Tensor | None = None  # [k] int64, ascending
    rows: torch.Tensor | None = None  # [k, d]


def scale_and_shift(rows: torch.Tensor, stretches: Sequence[tuple[int, int, Extras]]) -> None:
    """rows [n, d_out], in place: `gain * y + shift` on each stretch (first row, end, extras)."""
    for start, end, extra in stretches:
        if extra.gain is not None:
            rows[start:end].mul_(extra.gain)
        if extra.shift is not None:
            rows[start:end].add_(extra.shift)


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """What a batch needs of a READY adapter. Rows that share an adapter share the very object."""

    slot: int  # BASE_SLOT: no LoRA
    digest: str
    card: AdapterCard
    params: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])  # of its head
    extras: Mapping[str, Extras] = field(default_factory=dict[str, Extras])  # by module path
    alone: bool = False  # changes a module that the base runs once for all sequences: no other adapter beside it


BASE_CARD = AdapterCard(Task.EMBED, None, ProblemType.SINGLE_LABEL, None, None, None)
NO_ADAPTER = Resident(BASE_SLOT, "", BASE_CARD)


@dataclass(frozen=True, slots=True)
class CachedRow:
    """Where the keys and values of a sequence lie of which a row is the last `num_tokens` that are known."""

    start: int  # position of the row's first token; those before it were computed by earlier steps
    blocks: Sequence[int]  # of the KV cache, for all tokens up to the row's last
    num_inactive: int = 0  # of the sequence's first tokens, which an aLoRA leaves to the base
    states: tuple[RowState, ...] = ()  # that each draw the token that follows the row's last
    after: RowState | None = None  # the row's one token is the one that this state drew in the step before


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a batch, with what answers it; `task` None asks for the hidden states alone.

    A row with `cached` continues a sequence. Such rows come before all others of a batch.
    """

    sequence: TokenSequence
    resident: Resident = NO_ADAPTER
    task: Task | None = None
    pooling: Pooling | None = None  # of an EMBED row; None: as the adapter's card says
    cached: CachedRow | None = None

    @property
    def slot(self) -> int:
        return self.resident.slot

    @property
    def params(self) -> Mapping[str, torch.Tensor]:
        return self.resident.params


@dataclass(frozen=True, slots=True)
class EqualRun:
    """Neighbouring sequences of one length: attention takes them in one call."""

    start: int  # first token
    count: int  # sequences
    length: int  # tokens of each


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences; the rows of one adapter are adjacent.

    `padded_length` L is set when the base runs them padded, [N, L], because it cannot run them packed.
    """

    rows: tuple[Row, ...]
    input_ids: torch.Tensor  # [T] int64
    token_type_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, as the base counts them in each sequence
    pad_ids: torch.Tensor  # [N] int64: the id that a row's adapter pads with, -1: none
    cu_seqlens: torch.Tensor  # [N+1] int32
    lengths: tuple[int, ...]  # [N]
    equal_runs: tuple[EqualRun, ...]
    max_length: int
    padded_length: int | None = None
    num_cached_rows: int = 0  # the first ones, whose attention reads the KV cache

    @property
    def num_tokens(self) -> int:
        """T, without the tokens that fill up `into`."""
        return sum(self.lengths)

    @classmethod
    def pack(
        cls,
        rows: Sequence[Row],
        device: str | torch.device = "cpu",
        *,
        padded: bool = False,
        padding_idx: int | None = None,
        into: InputBuffer | None = None,
    ) -> Batch:
        """Pack rows in the order given; their integers reach `device` in one copy that nothing waits for.

        `padding_idx`: of a base whose positions count from there, see ForwardInputs. `into`: the tensors are those of
        this buffer, [its T] and [its N], filled up with tokens and sequences of nobody.
        """
        assert rows, "a batch has at least one row"
        lengths = tuple(row.sequence.num_tokens for row in rows)
        assert all(lengths), "a sequence has at least one token"
        is_cached = [row.cached is not None for row in rows]
        assert is_cached == sorted(is_cached, reverse=True), "rows that continue come first"
        found = Unpacked(
            lengths,
            [row.sequence.input_ids for row in rows],
            [_token_types(row) for row in rows],
            [-1 if (pad := row.resident.card.pad_token_id) is None else pad for row in rows],
            padding_idx,
            [0 if row.cached is None else row.cached.start for row in rows],
        )
        inputs = pack_inputs(found, torch.device(device)) if into is None else into.fill(found)
        return cls(
            rows=tuple(rows),
            input_ids=inputs.input_ids,
            token_type_ids=inputs.token_type_ids,
            position_ids=inputs.position_ids,
            pad_ids=inputs.pad_ids,
            cu_seqlens=inputs.cu_seqlens,
            lengths=lengths,
            equal_runs=equal_runs_of(lengths),
            num_cached_rows=sum(is_cached),
            max_length=max(lengths),
            padded_length=max(lengths) if padded else None,
        )


def _token_types(row: Row) -> tuple[int, ...] | None:
    return row.sequence.token_type_ids if row.resident.card.token_types else None


def equal_runs_of(lengths: Sequence[int]) -> tuple[EqualRun, ...]:
    """Neighbours of one length, of sequences packed from token 0 on."""
    runs: list[EqualRun] = []
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        runs.append(EqualRun(start, count, length))
        start += count * length
    return tuple(runs)


class Owners:
    """Which adapter owns which rows of a module's input: the plan of their LoRA, and their extras."""

    def __init__(self, plan: LoraPlan, parts: Sequence[tuple[Resident, int, int]], leading: int) -> None:
        """`parts` are (adapter, rows, of which LoRA leaves out the first); `leading` dimensions make the rows."""
        self.plan = plan
        self._parts = parts
        self._leading = leading
        self._extras: dict[str, tuple[tuple[int, int, Extras], ...]] | None = None

    @classmethod
    def of(cls, slots: SlotTable, parts: Sequence[tuple[Resident, int, int]], leading: int) -> Owners:
        """With the plan that the parts make."""
        counts: list[tuple[int, int]] = []
        for resident, count, skipped in parts:
            counts += [(BASE_SLOT, skipped), (resident.slot, count - skipped)]
        return cls(LoraPlan.build(slots, counts), parts, leading)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """A view of x as [rows, ...]."""
        return x.flatten(0, self._leading - 1) if self._leading > 1 else x

    def extras(self, path: str) -> tuple[tuple[int, int, Extras], ...]:
        """(first row, end, what changes) for each stretch of rows whose adapter changes the module at `path`."""
        if self._extras is None:
            self._extras = self._find_extras()
        return self._extras.get(path, ())

    def _find_extras(self) -> dict[str, tuple[tuple[int, int, Extras], ...]]:
        found: dict[str, list[tuple[int, int, Extras]]] = {}
        start = 0
        for resident, same in groupby(self._parts, key=lambda part: part[0]):
            end = start + sum(count for _, count, _ in same)
            for path, extras in resident.extras.items():
                found.setdefault(path, []).append((start, end, extras))
            start = end
        return {path: tuple(stretches) for path, stretches in found.items()}


class PagedAttention(Protocol):
    """Attention of a batch's first rows over the KV cache: `model.paged.PagedStep`."""

    num_tokens: int  # of those rows

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """q [t, H, D], k and v [t, H_kv, D] of those tokens, which are stored, → [t, H, D]."""
        ...


class Step:
    """What the wrapped modules need while one batch runs: who owns which rows, and the shrink a group shares."""

    is_static = False  # whether what runs is captured, to be run again with other content of the same tensors

    def __init__(self, batch: Batch, slots: SlotTable, backend: GroupedLora) -> None:
        self.batch = batch
        self.backend = backend
        self.group_backend = backend if isinstance(backend, GroupLora) else None
        # of the attention modules that called us, by id: KV heads, and the widths of a key and a value
        self.attention_modules: dict[int, tuple[int, int, int]] = {}
        self.attention_cache: dict[Any, Any] = {}  # what attention derives once for all layers
        self.paged: PagedAttention | None = None  # of the rows that continue
        self._slots = slots
        self._owners: dict[tuple[str, int], Owners] = {}
        self._shrunk: tuple[int, torch.Tensor, Any] | None = None

    def owners(self, x: torch.Tensor) -> Owners:
        """Of the rows of a backbone module's input: tokens [N, L, ...], or what is shared by all sequences."""
        length = self.batch.padded_length
        if length is None or tuple(x.shape[:2]) == (len(self.batch.rows), length):
            return self.tokens
        return self._shared(x.shape[0] if x.dim() == 2 and x.is_floating_point() else x.shape[:2].numel())

    @property
    def tokens(self) -> Owners:
        """Of the packed tokens [1, T, ...], or the padded ones [N, L, ...]."""
        key = "tokens", 0
        if key not in self._owners:
            length = self.batch.padded_length
            counts = self.batch.lengths if length is None else (length,) * len(self.batch.rows)
            parts = [(row.resident, n, _inactive(row)) for row, n in zip(self.batch.rows, counts, strict=True)]
            self._owners[key] = Owners.of(self._slots, parts, leading=2)
        return self._owners[key]

    def sequences(self, rows_per_sequence: int) -> Owners:
        """Of [N, ...] in the head stage, or of their [N * rows_per_sequence] rows for LoRA.

        An aLoRA answers from the last token, where it is active if it is anywhere.
        """
        key = "sequences", rows_per_sequence
        if key not in self._owners:
            never = (_inactive(row) == row.sequence.num_tokens for row in self.batch.rows)
            parts = [
                (row.resident, rows_per_sequence, rows_per_sequence * inactive)
                for row, inactive in zip(self.batch.rows, never, strict=True)
            ]
            self._owners[key] = Owners.of(self._slots, parts, leading=1)
        return self._owners[key]

    def _shared(self, num_rows: int) -> Owners:
        """Rows that all sequences share are an adapter's only where it has the batch to itself."""
        key = "shared", num_rows
        if key not in self._owners:
            first = self.batch.rows[0].resident
            sole = first if all(row.resident is first for row in self.batch.rows) else NO_ADAPTER
            self._owners[key] = Owners.of(self._slots, [(sole, num_rows, 0)], leading=1)
        return self._owners[key]

    def begin_shrink(self, x: torch.Tensor, group: SiteGroup) -> None:
        """Before the base's product of `x`: a step may compute the group's shrink beside it."""

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> Any:
        """The group's shrink of `x`, computed by its first site and kept until another input comes."""
        kept = self._shrunk
        if kept is None or kept[0] != group.index or kept[1] is not x:
            rows = x.reshape(-1, x.shape[-1])
            kept = self._shrunk = group.index, x, self.backend.shrink(rows, group, plan)
        return kept[2]


def _inactive(row: Row) -> int:
    """How many of the row's tokens, from its first on, an aLoRA leaves to the base."""
    num_tokens = row.sequence.num_tokens
    if row.cached is not None:
        return min(max(row.cached.num_inactive - row.cached.start, 0), num_tokens)
    active = first_active(row.resident.card, row.sequence.input_ids)
    return num_tokens if active is None else active


current_step: ContextVar[Step | None] = ContextVar("current_step", default=None)


def require_step() -> Step:
    """The step of this thread; our modules only ever run inside one."""
    step = current_step.get()
    assert step is not None, "a wrapped module ran outside a step"
    return step
