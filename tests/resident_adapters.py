"""Random adapters put into an arena by hand: as many as wanted, without files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.arena import ALayout, RankArena, SitePlacement, SlotTable, align
from lora_runtime.batch import BASE_CARD, Resident


def image_elements(base: BaseSpec, rank: int, sites: Collection[int]) -> int:
    """How much of an arena one such adapter takes."""
    return _place(base, rank, sites, ALayout.RANK_ROWS)[0]


def put_random_adapter(
    base: BaseSpec,
    arena: RankArena,
    slots: SlotTable,
    rank: int,
    sites: Collection[int],
    generator: torch.Generator,
    scale: float = 0.3,
) -> Resident:
    """An adapter with random matrices of standard deviation `scale` at these sites, READY."""
    num_elements, places = _place(base, rank, sites, slots.a_layout)
    run = arena.allocate(num_elements)
    arena.view(run).copy_(torch.randn(run.length, generator=generator) * scale)
    slot = slots.acquire()
    slots.publish(slot, run, places)
    return Resident(slot, f"adapter-{slot}", BASE_CARD)


def _place(
    base: BaseSpec, rank: int, sites: Collection[int], a_layout: ALayout
) -> tuple[int, tuple[SitePlacement, ...]]:
    """(elements, places): for each group its A, then all B."""
    cursor, places = 0, list[SitePlacement]()
    for group in base.groups:
        own = [site for site in group.sites if site.index in sites]
        for nth, site in enumerate(own):
            a_offset = cursor + a_layout.place(nth * rank, site.d_in)
            places.append(SitePlacement(site.index, a_offset, 0, rank, 0.5))
        cursor = align(cursor + len(own) * rank * group.d_in)
    for i, place in enumerate(places):
        places[i] = replace(place, b_offset=cursor)
        cursor = align(cursor + rank * base.sites[place.site].d_out)
    return cursor, tuple(places)
