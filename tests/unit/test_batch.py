"""Who owns which rows of a step: LoRA segments, extras, aLoRA's inactive tokens, rows that sequences share."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime import packing
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import BASE_CARD, Batch, Extras, Resident, Row, Step
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.model.base import like_lengths
from lora_runtime.packing import PAD_SEQUENCE, InputBuffer, PackedLayout
from lora_runtime.types import TokenSequence
from tests.fakes import WIDTH, fake_spec

SPEC = fake_spec()


def step_of(rows: list[Row], *, padded: bool = False) -> Step:
    slots = SlotTable(len(SPEC.sites), SPEC.groups, num_slots=8)
    return Step(Batch.pack(rows, padded=padded), slots, ReferenceGroupedLora(RankArena(4096)))


def sequence(*ids: int) -> TokenSequence:
    return TokenSequence(ids, None)


def resident(slot: int, **fields: object) -> Resident:
    return replace(Resident(slot, f"digest-{slot}", BASE_CARD), **fields)


def segments(step: Step) -> list[tuple[int, int, int]]:
    return [(s.slot, s.start, s.end) for s in step.tokens.plan.segments]


def test_neighbours_of_one_adapter_are_one_segment_and_the_base_is_in_none() -> None:
    one, two = resident(1), resident(2)
    rows = [Row(sequence(5, 6), one), Row(sequence(7), one), Row(sequence(8, 9, 10)), Row(sequence(11), two)]
    assert segments(step_of(rows)) == [(1, 0, 3), (2, 6, 7)]


def test_padded_rows_are_counted_with_their_padding() -> None:
    one, two = resident(1), resident(2)
    rows = [Row(sequence(5, 6), one), Row(sequence(7, 8, 9), two), Row(sequence(7), two)]
    assert segments(step_of(rows, padded=True)) == [(1, 0, 3), (2, 3, 9)]


def test_an_alora_is_active_from_its_last_invocation_and_never_without_one() -> None:
    active = resident(1, card=replace(BASE_CARD, invocation_tokens=(7, 8)))
    twice = Row(sequence(7, 8, 5, 7, 8, 9), active)
    absent = Row(sequence(7, 9, 8), active)
    at_the_end = Row(sequence(1, 7, 8), active)
    assert segments(step_of([twice])) == [(1, 3, 6)]
    assert segments(step_of([absent])) == []
    assert segments(step_of([at_the_end, absent, twice])) == [(1, 1, 3), (1, 9, 12)]


def test_an_alora_changes_the_head_of_a_text_that_invokes_it_only() -> None:
    active, plain = resident(1, card=replace(BASE_CARD, invocation_tokens=(7, 8))), resident(2)
    rows = [Row(sequence(7, 8, 5), active), Row(sequence(7, 9, 8), active), Row(sequence(1), plain)]
    found = step_of(rows).sequences(1).plan.segments
    assert [(s.slot, s.start, s.end) for s in found] == [(1, 0, 1), (2, 2, 3)]


def test_extras_are_found_by_module_for_the_rows_of_their_adapter_alone() -> None:
    extras = Extras(shift=torch.ones(WIDTH))
    plain, biased = resident(1), resident(2, extras={"layer.q": extras})
    rows = [Row(sequence(1, 2), plain), Row(sequence(3), biased), Row(sequence(4, 5), biased), Row(sequence(6))]
    owners = step_of(rows).tokens
    assert owners.extras("layer.q") == ((2, 5, extras),)
    assert owners.extras("layer.v") == ()


def test_rows_that_all_sequences_share_belong_to_an_adapter_only_when_it_is_alone() -> None:
    one, two = resident(1), resident(2)
    shared = torch.zeros(1, 10, WIDTH)  # relative positions, for two sequences of three tokens
    alone = step_of([Row(sequence(1, 2, 3), one), Row(sequence(4), one)], padded=True).owners(shared)
    mixed = step_of([Row(sequence(1, 2, 3), one), Row(sequence(4), two)], padded=True).owners(shared)
    assert [(s.slot, s.start, s.end) for s in alone.plan.segments] == [(1, 0, 10)]
    assert mixed.plan.segments == ()


def test_padded_batches_are_of_like_length_with_the_rows_of_an_adapter_adjacent() -> None:
    one, two = resident(1), resident(2)
    lengths = [4, 5, 100, 4, 90, 5]
    owners = [one, two, one, two, two, one]
    rows = [Row(sequence(*range(1, n + 1)), owner) for n, owner in zip(lengths, owners, strict=True)]
    batches = like_lengths(rows)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert sorted(map(sorted, batches)) == [[0, 1, 3, 5], [2, 4]]
    for batch in batches:
        of = [rows[i].resident for i in batch]
        assert sum(a is not b for a, b in itertools.pairwise(of)) == len({id(r) for r in of}) - 1


def test_an_adapter_that_changes_what_sequences_share_gets_padded_batches_of_its_own() -> None:
    one, two, three = resident(1, alone=True), resident(2), resident(3, alone=True)
    rows = [Row(sequence(1, 2, 3), owner) for owner in (one, two, three, one)] + [Row(sequence(1, 2))]
    batches = [sorted(batch) for batch in like_lengths(rows)]
    assert sorted(batches) == [[0, 3], [1, 4], [2]]


def test_the_integers_of_a_batch_are_one_buffer_that_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    empty = torch.empty

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        made.append(empty(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(packing.torch, "empty", counted)
    batch = Batch.pack([Row(sequence(5, 6, 7)), Row(sequence(8))])
    monkeypatch.undo()
    (buffer,) = made
    parts = (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.pad_ids, batch.cu_seqlens)
    assert {part.untyped_storage().data_ptr() for part in parts} == {buffer.untyped_storage().data_ptr()}
    assert [part.tolist() for part in parts] == [[5, 6, 7, 8], [0, 0, 0, 0], [0, 1, 2, 0], [-1, -1], [0, 3, 4]]


def test_positions_count_as_the_roberta_family_does() -> None:
    batch = Batch.pack([Row(sequence(5, 1, 7)), Row(sequence(1, 8))], padding_idx=1)
    assert batch.position_ids.tolist() == [2, 1, 3, 1, 2]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(0, 200), st.sampled_from([None, 1]))
def test_what_fills_a_buffer_up_belongs_to_nobody(lengths: list[int], spare: int, padding_idx: int | None) -> None:
    rows = [Row(sequence(*range(3, 3 + n))) for n in lengths]
    total = sum(lengths)
    buffer = InputBuffer(PackedLayout(total + spare, len(rows) + 5), torch.device("cpu"))
    buffer.buffer.fill_(-99)
    plain = Batch.pack(rows, padding_idx=padding_idx)
    filled = Batch.pack(rows, padding_idx=padding_idx, into=buffer)
    assert filled.input_ids.data_ptr() == buffer.buffer.data_ptr()
    assert filled.num_tokens == plain.num_tokens == total
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(filled, name)[:total], getattr(plain, name))
    ends = filled.cu_seqlens.tolist()
    assert ends[: len(rows) + 1] == plain.cu_seqlens.tolist()
    assert ends[-1] == total + spare and ends == sorted(ends)
    assert all(b - a <= PAD_SEQUENCE for a, b in itertools.pairwise(ends[len(rows) :]))
    assert filled.input_ids[total:].eq(0).all() and filled.position_ids.ge(0).all()
    assert not buffer.layout.holds(total + spare + 1, len(rows))
    assert not buffer.layout.holds(total, len(rows) + 6)
