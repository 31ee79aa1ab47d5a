"""The CPU backend equals the mathematics for any mix of ranks, lengths, slices and rows without an adapter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.arena import BASE_SLOT, RankArena, SitePlacement, SlotTable, align
from lora_runtime.kernels.grouped_lora import LoraPlan, grouped_lora
from lora_runtime.kernels.grouped_lora.cpu import CpuGroupedLora
from lora_runtime.kernels.gemm_batch import GemmBatch
from lora_runtime.kernels.grouped_lora.mkl import MklGroupedLora
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.types import Site, SiteGroup

RANKS = (0, 1, 3, 8, 16, 32, 64, 256)


@dataclass
class World:
    """Adapters of given ranks per site in one arena."""

    group: SiteGroup
    arena: RankArena
    slots: SlotTable

    @classmethod
    def make(cls, ranks: list[list[int]], d_in: int, d_outs: list[int], seed: int = 0) -> World:
        sites = tuple(Site(i, str(i), d_in, d, 0, per_sequence=False) for i, d in enumerate(d_outs))
        world = cls(SiteGroup(0, d_in, sites), RankArena(64 << 20), SlotTable(len(sites), (SiteGroup(0, d_in, sites),)))
        world.arena.buffer[: 1 << 20].fill_(float("nan"))  # what is read without having been written shows
        generator = torch.Generator().manual_seed(seed)
        for of_site in ranks:
            world.add(of_site, generator)
        return world

    def add(self, ranks: list[int], generator: torch.Generator) -> int:
        places, column = [], 0
        for site, rank in zip(self.group.sites, ranks, strict=True):
            places.append(SitePlacement(site.index, column, 0, rank, 0.5 + rank / 7))
            column += rank
        cursor = align(column * self.group.d_in)
        for i, site in enumerate(self.group.sites):
            place = places[i]
            places[i] = SitePlacement(site.index, place.a_offset, cursor, place.rank, place.scaling)
            cursor = align(cursor + place.rank * site.d_out)
        run = self.arena.allocate(max(cursor, 1))
        view = self.arena.view(run)[:cursor]
        view.copy_(torch.randn(cursor, generator=generator) / 8)
        slot = self.slots.acquire()
        self.slots.publish(slot, run, tuple(p for p in places if p.rank))
        return slot

    def run(self, backend: object, x: torch.Tensor, plan: LoraPlan, outs: list[torch.Tensor]) -> list[torch.Tensor]:
        outs = [out.clone() for out in outs]
        grouped_lora(backend, x, self.group, plan, dict(enumerate(outs)))  # pyright: ignore
        return outs


def check(world: World, rows: list[tuple[int, int]], seed: int = 1) -> None:
    plan = LoraPlan.build(world.slots, rows)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(plan.num_rows, world.group.d_in, generator=generator)
    outs = [torch.randn(plan.num_rows, site.d_out, generator=generator) for site in world.group.sites]
    exact = world.run(ReferenceGroupedLora(world.arena), x.double(), plan, [out.double() for out in outs])
    backend = backend_of(world)
    found = world.run(backend, x, LoraPlan.build(world.slots, rows), outs)
    again = world.run(backend, x, LoraPlan.build(world.slots, rows), outs)
    for got, twice, want, before in zip(found, again, exact, outs, strict=True):
        assert torch.equal(got, twice), "not repeatable"
        norm = want.norm() or torch.tensor(1.0)
        assert (got.double() - want).norm() / norm < 1e-5
        cursor = 0
        for slot, count in rows:
            if slot == BASE_SLOT:
                assert torch.equal(got[cursor : cursor + count], before[cursor : cursor + count]), "base rows changed"
            cursor += count


def backend_of(world):
    return MklGroupedLora(world.arena, world.slots, GemmBatch.find())


rows_of = st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 40)), min_size=0, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.lists(st.sampled_from(RANKS), min_size=2, max_size=2), min_size=6, max_size=6),
    rows=rows_of,
    d_in=st.sampled_from([16, 36, 52]),
)
def test_any_mix_equals_the_reference(ranks: list[list[int]], rows: list[tuple[int, int]], d_in: int) -> None:
    unique = {slot: count for slot, count in rows}
    check(World.make(ranks, d_in, [d_in, 20]), list(unique.items()))


@pytest.mark.parametrize("num_slices", [1, 2, 3])
@pytest.mark.parametrize(
    "counts", [[1] * 8, [4] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [40] * 8, [2, 200, 2, 300, 2, 2, 2, 17]]
)
def test_all_ranks_in_one_call(num_slices: int, counts: list[int]) -> None:
    ranks = [[RANKS[(i + s) % len(RANKS)] for s in range(num_slices)] for i in range(8)]
    check(World.make(ranks, 48, [32, 48, 20][:num_slices]), list(enumerate(counts)))


def test_base_rows_between_short_segments_keep_their_bits() -> None:
    world = World.make([[8], [8], [8], [8], [8]], 32, [32])
    check(world, [(0, 2), (BASE_SLOT, 3), (1, 2), (2, 2), (BASE_SLOT, 1), (3, 2), (4, 2)])


def test_a_wrong_adapter_is_caught_by_the_comparison() -> None:
    world = World.make([[8], [8]], 32, [32])
    x, out = torch.randn(10, 32), torch.zeros(10, 32)
    right = world.run(ReferenceGroupedLora(world.arena), x, LoraPlan.build(world.slots, [(0, 5), (1, 5)]), [out])[0]
    swapped = world.run(
        backend_of(world), x, LoraPlan.build(world.slots, [(1, 5), (0, 5)]), [out]
    )[0]
    assert (right - swapped).norm() / right.norm() > 0.1


def test_a_slot_used_again_gives_the_new_adapters_answer() -> None:
    """Cached views and stacks are keyed by generation, so a new adapter in an old slot is never answered by it."""
    world = World.make([[8]] * 5, 32, [32])
    backend = backend_of(world)
    x = torch.randn(10, 32)
    rows = [(slot, 2) for slot in range(5)]
    world.run(backend, x, LoraPlan.build(world.slots, rows), [torch.zeros(10, 32)])
    world.slots.release(2)
    assert world.add([8], torch.Generator().manual_seed(99)) == 2
    plan = LoraPlan.build(world.slots, rows)
    exact = world.run(ReferenceGroupedLora(world.arena), x, plan, [torch.zeros(10, 32)])[0]
    found = world.run(backend, x, plan, [torch.zeros(10, 32)])[0]
    assert (found - exact).norm() / exact.norm() < 1e-5


def test_the_same_row_in_batches_of_different_size_agrees() -> None:
    world = World.make([[16]] * 6, 48, [48])
    backend = backend_of(world)
    x = torch.randn(600, 48)
    alone = world.run(backend, x[:3], LoraPlan.build(world.slots, [(0, 3)]), [torch.zeros(3, 48)])[0]
    for others in ([(1, 3), (2, 3), (3, 3)], [(1, 300)], [(1, 1), (2, 2), (3, 40), (4, 5), (5, 6)]):
        rows = [(0, 3), *others]
        total = sum(count for _, count in rows)
        found = world.run(backend, x[:total], LoraPlan.build(world.slots, rows), [torch.zeros(total, 48)])[0]
        assert torch.allclose(found[:3], alone, rtol=1e-5, atol=1e-6)


def test_a_plan_outliving_its_slot_is_noticed() -> None:
    world = World.make([[8]], 32, [32])
    plan = LoraPlan.build(world.slots, [(0, 4)])
    plan.check_current()
    world.slots.release(0)
    with pytest.raises(AssertionError, match="generation 1, not 0"):
        plan.check_current()


@pytest.mark.parametrize("stack_bytes", [0, 40_000, 1 << 20])
def test_copies_stay_within_their_budget_and_answers_are_the_same_without_them(stack_bytes: int) -> None:
    world = World.make([[8]] * 16, 32, [32])
    backend = CpuGroupedLora(world.arena, world.slots, stack_bytes)
    reference = ReferenceGroupedLora(world.arena)
    x, out = torch.randn(16, 32), torch.zeros(16, 32)
    for turn in range(40):
        rows = [((slot + turn) % 16, 1) for slot in range(4 + turn % 12)]
        plan = LoraPlan.build(world.slots, rows)
        want = world.run(reference, x[: len(rows)], plan, [out[: len(rows)]])[0]
        torch.testing.assert_close(world.run(backend, x[: len(rows)], plan, [out[: len(rows)]])[0], want)
        assert backend.cached_bytes <= stack_bytes
    assert (backend.cached_bytes > 0) == (stack_bytes > 0)


def test_a_moved_adapter_answers_from_its_new_place() -> None:
    world = World.make([[8], [8]], 32, [32])
    backend = backend_of(world)
    x, out = torch.randn(10, 32), torch.zeros(10, 32)
    before = world.run(backend, x, LoraPlan.build(world.slots, [(1, 10)]), [out])[0]
    first, second = (run for run in sorted(world.arena._used.values()))
    world.slots.release(0)
    world.arena.free(first)
    moved = world.arena.move_down(second)
    world.slots.move(1, moved)
    world.arena.buffer[moved.end :].fill_(float("nan"))
    assert moved.offset < second.offset
    assert torch.equal(world.run(backend, x, LoraPlan.build(world.slots, [(1, 10)]), [out])[0], before)
