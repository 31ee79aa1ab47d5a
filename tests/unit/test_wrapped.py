"""The base's modules as an adapter's rows see them, and what the rows beside them see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import BASE_CARD, NO_ADAPTER, Batch, Extras, Resident, Row, Step, current_step
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.model.wrapped import AdaptedEmbedding
from lora_runtime.types import TokenSequence
from tests.fakes import fake_spec

NUM_ROWS, WIDTH = 6, 3
TABLE = torch.arange(NUM_ROWS * WIDTH, dtype=torch.float32).view(NUM_ROWS, WIDTH)
LONGER = Resident(1, "longer", BASE_CARD, extras={"words": Extras({"weight": -torch.ones(NUM_ROWS + 2, WIDTH)})})
ADDED = Resident(
    2,
    "added",
    BASE_CARD,
    extras={"words": Extras(row_ids=torch.tensor([1, NUM_ROWS]), rows=torch.full((2, WIDTH), 9.0))},
)


def embed(*rows: tuple[tuple[int, ...], Resident]) -> list[list[float]]:
    """The first value of each token, row by row."""
    spec = fake_spec()
    batch = Batch.pack([Row(TokenSequence(ids, None), resident) for ids, resident in rows])
    step = Step(batch, SlotTable(len(spec.sites), spec.groups), ReferenceGroupedLora(RankArena(64)))
    module = AdaptedEmbedding(nn.Embedding.from_pretrained(TABLE), "words")
    token = current_step.set(step)
    try:
        (found,) = module(batch.input_ids[None])[..., 0]
    finally:
        current_step.reset(token)
    return [part.tolist() for part in found.split(batch.lengths)]


def test_an_adapters_rows_beyond_the_base_are_its_own_alone() -> None:
    found = embed(((5, 0), NO_ADAPTER), ((0, NUM_ROWS + 1), LONGER), ((1, 2, NUM_ROWS), ADDED), ((1,), NO_ADAPTER))
    assert found == [[15.0, 0.0], [-1.0, -1.0], [9.0, 6.0, 9.0], [3.0]]


@pytest.mark.parametrize("resident", [NO_ADAPTER, replace(LONGER, extras={}), ADDED])
def test_a_token_without_a_row_is_answered_by_no_other_row(resident: Resident) -> None:
    """Nor because an adapter beside it has one there."""
    with pytest.raises(IndexError):
        embed(((0, NUM_ROWS + 1), LONGER), ((0, NUM_ROWS + 1), resident))
