"""What the Triton kernels read on the device: the list of tiles, and the mirror of the slot table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.arena import BASE_SLOT, ALayout, Run, SitePlacement, SlotTable
from lora_runtime.kernels.grouped_lora import LoraPlan
from lora_runtime.kernels.grouped_lora.triton_backend.slots import DeviceSlots
from lora_runtime.kernels.grouped_lora.triton_backend.tiles import TileList, count_tiles
from lora_runtime.types import Site, SiteGroup

CPU = torch.device("cpu")
Q, K = Site(0, "q", 32, 32, 0, per_sequence=False), Site(2, "k", 32, 48, 0, per_sequence=False)
O = Site(1, "o", 48, 32, 1, per_sequence=False)  # noqa: E741 - called between the other two
GROUPS = (SiteGroup(0, 32, (Q, K)), SiteGroup(1, 48, (O,)))
ADDRESSES = ("a_offset", "group_rank", "b_offset", "column", "rank", "scaling")


def table(num_slots: int = 4) -> SlotTable:
    return SlotTable(3, GROUPS, num_slots, ALayout.RANK_ROWS)


def publish(slots: SlotTable, q: int, k: int, o: int, offset: int = 0) -> int:
    """An adapter of these ranks (0: no matrix) whose image begins at `offset`."""
    slot, places, cursor = slots.acquire(), [], 0
    for group, ranks in ((GROUPS[0], (q, k)), (GROUPS[1], (o,))):
        b_offset = cursor + sum(ranks) * group.d_in
        for site, rank in zip(group.sites, ranks, strict=True):
            if rank:
                places.append(SitePlacement(site.index, cursor, b_offset, rank, 0.5 * rank))
                cursor += rank * site.d_in
                b_offset += rank * site.d_out
        cursor = b_offset
    slots.publish(slot, Run(offset, cursor or 16), tuple(places))
    return slot


def tiles_in(tiles: TileList) -> list[tuple[int, ...]]:
    """(slot, first row, rows) as a kernel would read them."""
    count, *values = tiles.buffer.tolist()
    return [tuple(values[3 * i : 3 * i + 3]) for i in range(count)]


def test_segments_are_cut_into_tiles_in_batch_order() -> None:
    plan = LoraPlan.build(table(), [(2, 5), (BASE_SLOT, 3), (0, 33), (1, 16)])
    found = tiles_in(TileList.of(plan, 16, CPU))
    assert found == [(2, 0, 5), (0, 8, 16), (0, 24, 16), (0, 40, 1), (1, 41, 16)]


@given(
    counts=st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 70)), max_size=10),
    tile_rows=st.sampled_from([16, 32, 64]),
)
def test_tiles_cover_each_segment_once(counts: list[tuple[int, int]], tile_rows: int) -> None:
    plan = LoraPlan.build(table(), counts)
    tiles = TileList.of(plan, tile_rows, CPU)
    assert tiles.capacity == tiles.num_tiles == count_tiles(plan, tile_rows)
    owner = {row: segment.slot for segment in plan.segments for row in range(segment.start, segment.end)}
    covered = [(row, slot) for slot, first, rows in tiles_in(tiles) for row in range(first, first + rows)]
    assert sorted(covered) == sorted(owner.items())
    assert all(0 < rows <= tile_rows for _, _, rows in tiles_in(tiles))


def test_a_list_is_refilled_in_place_with_more_with_none_and_with_fewer() -> None:
    slots = table()
    publish(slots, 8, 8, 8)
    tiles = TileList(4, 16, CPU, max_rank=8)
    address = tiles.buffer.data_ptr()
    assert tiles_in(tiles) == []
    for rows in ([(0, 40)], [], [(0, 3)], [(BASE_SLOT, 9)], [(0, 20), (BASE_SLOT, 1), (0, 20)]):
        plan = LoraPlan.build(slots, rows)
        tiles.fill(plan)
        assert tiles_in(tiles) == tiles_in(TileList.of(plan, 16, CPU))
        assert tiles.buffer.data_ptr() == address


def test_tiles_that_stay_the_same_are_not_copied_again() -> None:
    slots = table()
    publish(slots, 8, 8, 8), publish(slots, 8, 8, 8)
    tiles = TileList(4, 16, CPU, max_rank=8)
    for rows in ([(0, 1), (1, 1)], [(1, 1), (0, 1)]):
        tiles.fill(LoraPlan.build(slots, rows))
        want = tiles_in(tiles)
        tiles.buffer[1:] = -7
        tiles.fill(LoraPlan.build(slots, rows))
        assert (tiles.buffer[1:] == -7).all()
        tiles.fill(LoraPlan.build(slots, [(0, 3)]))
        tiles.fill(LoraPlan.build(slots, rows))
        assert tiles_in(tiles) == want


def test_a_plan_that_is_too_large_does_not_fit() -> None:
    slots = table()
    small, large = publish(slots, 8, 0, 0), publish(slots, 0, 9, 0, offset=4096)
    tiles = TileList(2, 16, CPU, max_rank=8)
    assert tiles.fits(LoraPlan.build(slots, [(small, 32)]))
    for rows in ([(small, 33)], [(small, 1), (large, 1)]):
        plan = LoraPlan.build(slots, rows)
        assert not tiles.fits(plan)
        with pytest.raises(AssertionError, match="too small"):
            tiles.fill(plan)
    assert tiles_in(tiles) == []


def test_the_scratch_is_as_wide_as_the_largest_adapter_of_the_group() -> None:
    slots = table()
    plain, wide = publish(slots, 8, 3, 1), publish(slots, 20, 30, 0, offset=4096)
    of_both = LoraPlan.build(slots, [(plain, 1), (wide, 1)])
    tiles = TileList.of(of_both, 16, CPU)
    assert [tiles.width(group, of_both) for group in GROUPS] == [64, 16]
    of_one = LoraPlan.build(slots, [(plain, 1)])
    assert TileList.of(of_one, 16, CPU).width(GROUPS[0], of_one) == 16
    static = TileList(4, 16, CPU, max_rank=12)
    assert [static.width(group, of_one) for group in GROUPS] == [32, 16]


def test_a_static_plan_has_every_group_active() -> None:
    slots = table()
    plan = TileList(4, 16, CPU, max_rank=8).static_plan(slots, 32)
    assert all(plan.active(group) for group in GROUPS)
    plan.check_current()


def check_mirror(mirror: DeviceSlots, slots: SlotTable) -> None:
    """Equal to what the table says, slot by slot."""
    for slot in range(slots.num_slots):
        for group in GROUPS:
            column, start = 0, None
            for site in group.sites:
                a_offset, b_offset, rank, scaling = slots.entry(slot, site.index)
                assert mirror.rank[slot, site.index] == rank
                if rank:
                    start = a_offset if start is None else start
                    assert mirror.column[slot, site.index] == column
                    assert mirror.b_offset[slot, site.index] == b_offset
                    assert mirror.scaling[slot, site.index] == scaling
                column += rank
            assert mirror.group_rank[slot, group.index] == column
            assert start is None or mirror.a_offset[slot, group.index] == start


def addresses(mirror: DeviceSlots) -> list[int]:
    return [getattr(mirror, name).data_ptr() for name in ADDRESSES]


def test_the_mirror_follows_publishing_releasing_moving_and_using_a_slot_again() -> None:
    slots = table()
    mirror = DeviceSlots(slots, CPU)
    before = addresses(mirror)
    first, second = publish(slots, 8, 3, 0), publish(slots, 0, 3, 16, offset=4096)
    assert not mirror.is_current
    mirror.refresh()
    check_mirror(mirror, slots)
    slots.move(second, Run(2048, 2048))
    slots.release(first)
    mirror.refresh()
    check_mirror(mirror, slots)
    assert publish(slots, 1, 0, 2, offset=8192) == first
    mirror.refresh()
    check_mirror(mirror, slots)
    assert mirror.is_current
    assert (mirror.generation, addresses(mirror)) == (0, before)


def test_a_refresh_copies_what_changed_and_nothing_else() -> None:
    slots = table(8)
    for i in range(6):
        publish(slots, 8, 8, 8, offset=4096 * i)
    mirror = DeviceSlots(slots, CPU)
    mirror.rank.fill_(-7)
    slots.release(1)
    slots.move(4, Run(65536, 4096))
    mirror.refresh()
    assert [slot for slot in range(8) if (mirror.rank[slot] != -7).any()] == [1, 4]
    mirror.rank.fill_(-7)
    mirror.refresh()
    assert (mirror.rank == -7).all()


def test_growth_beyond_the_capacity_changes_the_generation() -> None:
    slots = table(2)
    mirror = DeviceSlots(slots, CPU, capacity=4)
    for i in range(4):
        publish(slots, 8, 3, 1, offset=4096 * i)
    mirror.refresh()
    assert (slots.num_slots, mirror.capacity, mirror.generation) == (4, 4, 0)
    publish(slots, 1, 3, 1, offset=4096 * 4)
    mirror.refresh()
    assert mirror.generation == 1
    assert mirror.capacity >= slots.num_slots == 8
    check_mirror(mirror, slots)


def test_a_slot_that_nobody_refreshed_is_noticed_by_its_ranks() -> None:
    """Released slots have no ranks, so their rows would come out as the base's, never as another adapter's."""
    slots = table()
    slot = publish(slots, 8, 8, 8)
    mirror = DeviceSlots(slots, CPU)
    slots.release(slot)
    mirror.refresh()
    assert not mirror.rank[slot].any()
    assert not mirror.group_rank[slot].any()
    assert mirror.scaling[slot].isnan().any()


@pytest.mark.parametrize(("offset", "gap", "match"), [(0, 32, "not adjacent"), (8, 0, "not aligned")])
def test_an_image_that_the_kernels_cannot_read_is_noticed(offset: int, gap: int, match: str) -> None:
    slots = table()
    slot = slots.acquire()
    places = SitePlacement(0, 0, 2048, 8, 1.0), SitePlacement(2, 8 * 32 + gap, 4096, 8, 1.0)
    slots.publish(slot, Run(offset, 8192), places)
    with pytest.raises(AssertionError, match=match):
        DeviceSlots(slots, CPU)
