"""One step's sequences packed without padding, and the context that the wrapped modules read during the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from lora_runtime.arena import BASE_SLOT, SlotTable
from lora_runtime.kernels.grouped_lora import GroupedLora, LoraPlan
from lora_runtime.types import SiteGroup, Task, TokenSequence

_NO_PARAMS: Mapping[str, torch.Tensor] = {}


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a batch, with what answers it.

    `slot` is the adapter's LoRA, BASE_SLOT for none. `params` are the parameters of its head; rows that share one
    adapter share the very mapping. `task` None asks for the hidden states alone.
    """

    sequence: TokenSequence
    slot: int = BASE_SLOT
    task: Task | None = None
    params: Mapping[str, torch.Tensor] = field(default_factory=lambda: _NO_PARAMS)


@dataclass(frozen=True, slots=True)
class EqualRun:
    """Neighbouring sequences of one length: attention takes them in one call."""

    start: int  # first token
    count: int  # sequences
    length: int  # tokens of each


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences; the rows of one adapter are adjacent."""

    rows: tuple[Row, ...]
    input_ids: torch.Tensor  # [T] int64
    token_type_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [N+1] int32
    lengths: tuple[int, ...]  # [N]
    equal_runs: tuple[EqualRun, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @classmethod
    def pack(cls, rows: Sequence[Row], device: str = "cpu") -> Batch:
        """Pack rows in the order given."""
        assert rows, "a batch has at least one row"
        lengths = tuple(row.sequence.num_tokens for row in rows)
        assert all(lengths), "a sequence has at least one token"
        types = [row.sequence.token_type_ids or (0,) * n for row, n in zip(rows, lengths, strict=True)]
        ends = torch.tensor((0, *lengths)).cumsum(0)
        return cls(
            rows=tuple(rows),
            input_ids=torch.tensor([t for row in rows for t in row.sequence.input_ids], device=device),
            token_type_ids=torch.tensor([t for ids in types for t in ids], device=device),
            position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
            cu_seqlens=ends.to(device, torch.int32),
            lengths=lengths,
            equal_runs=_equal_runs(lengths),
        )


def _equal_runs(lengths: tuple[int, ...]) -> tuple[EqualRun, ...]:
    runs: list[EqualRun] = []
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        runs.append(EqualRun(start, count, length))
        start += count * length
    return tuple(runs)


class Step:
    """What the wrapped modules need while one batch runs: its plan, and the shrink that a site group shares."""

    def __init__(self, batch: Batch, slots: SlotTable, backend: GroupedLora) -> None:
        self.batch = batch
        self.backend = backend
        self.attention_modules: set[int] = set()  # ids of the attention modules that called us, for the probe
        self._slots = slots
        self._plans: dict[int | None, LoraPlan] = {}
        self._shrunk: tuple[int, torch.Tensor, Any] | None = None

    @property
    def token_plan(self) -> LoraPlan:
        """Segments over the packed tokens."""
        return self._plan(None)

    def sequence_plan(self, rows_per_sequence: int) -> LoraPlan:
        """Segments over [N * rows_per_sequence] rows of the head stage."""
        return self._plan(rows_per_sequence)

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> Any:
        """The group's shrink of `x`, computed by its first site and kept until another input comes."""
        kept = self._shrunk
        if kept is None or kept[0] != group.index or kept[1] is not x:
            rows = x.view(-1, x.shape[-1])
            kept = self._shrunk = group.index, x, self.backend.shrink(rows, group, plan)
        return kept[2]

    def _plan(self, rows_per_sequence: int | None) -> LoraPlan:
        if rows_per_sequence not in self._plans:
            counts = self.batch.lengths if rows_per_sequence is None else [rows_per_sequence] * len(self.batch.rows)
            slots = [row.slot for row in self.batch.rows]
            self._plans[rows_per_sequence] = LoraPlan.build(self._slots, list(zip(slots, counts, strict=True)))
        return self._plans[rows_per_sequence]


current_step: ContextVar[Step | None] = ContextVar("current_step", default=None)


def require_step() -> Step:
    """The step of this thread; our modules only ever run inside one."""
    step = current_step.get()
    assert step is not None, "a wrapped module ran outside a step"
    return step
