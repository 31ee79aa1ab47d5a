"""A step's work as rows for the runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_runtime.batch import CachedRow, Resident, Row
from lora_runtime.kv_blocks import BlockCopy
from lora_runtime.tickets import Ticket, Work
from lora_runtime.types import AdapterId, TokenSequence

_UNKNOWN = TokenSequence((0,), None)


@dataclass(frozen=True, slots=True)
class Planned:
    """A batch: its work in row order, and the adapters it holds."""

    work: list[Work]
    residents: Mapping[AdapterId, Resident]

    @property
    def copies(self) -> list[BlockCopy]:
        """Blocks to be copied before anything is written."""
        return [item.copy for item in self.work if item.copy is not None]

    def rows(self) -> list[Row]:
        """One for each work."""
        return [_row(item, self.residents[item.ticket.adapter]) for item in self.work]

    def places_of_tickets(self) -> dict[Ticket, list[int]]:
        """Where each request's work stands in the batch."""
        places: dict[Ticket, list[int]] = {}
        for place, item in enumerate(self.work):
            places.setdefault(item.ticket, []).append(place)
        return places


def in_row_order(work: Sequence[Work]) -> list[Work]:
    """Those that continue first; rows of one adapter adjacent, adapters by length so that equal lengths meet."""
    groups: dict[tuple[bool, AdapterId], list[Work]] = {}
    for item in work:
        groups.setdefault((item.continuation is None, item.ticket.adapter), []).append(item)
    for items in groups.values():
        items.sort(key=lambda item: item.num_tokens)
    ordered = sorted(groups.items(), key=lambda group: (group[0][0], group[1][0].num_tokens))
    return [item for _, items in ordered for item in items]


def _row(item: Work, resident: Resident) -> Row:
    request, one = item.ticket.request, item.continuation
    if one is None:
        return Row(request.sequences[item.index], resident, request.task, request.pooling)
    assert one.table is not None, "what a step computes has blocks"
    states = tuple(branch.row for branch in item.branches)
    if item.start == len(one.tokens):  # the step before this one draws it
        cached = CachedRow(item.start, one.table.blocks, one.num_inactive, states, after=one.row)
        return Row(_UNKNOWN, resident, request.task, cached=cached)
    tokens = TokenSequence(tuple(one.tokens[item.start : item.start + item.count]), None)
    cached = CachedRow(item.start, one.table.blocks, one.num_inactive, states)
    return Row(tokens, resident, request.task, cached=cached)
