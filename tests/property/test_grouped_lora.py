"""Every backend equals the mathematics for any mix of ranks, lengths, slices and rows without an adapter.

Triton runs on a CUDA device where there is one, else in its interpreter, which is slow: there, batches have at most
64 rows.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.arena import BASE_SLOT, RankArena, SitePlacement, SlotTable, align
from lora_runtime.kernels.grouped_lora import GroupedLora, GroupLora, LoraPlan, grouped_lora
from lora_runtime.kernels.grouped_lora.cpu import CpuGroupedLora
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.kernels.grouped_lora.registry import BACKENDS, TOLERANCES, BackendResources
from lora_runtime.types import Site, SiteGroup

RANKS = (0, 1, 3, 8, 16, 32, 64, 256)
HAS_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Subject:
    """One backend with activations and adapters of one dtype."""

    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def device(self) -> str:
        return "cuda" if self.backend == "triton" and HAS_CUDA else "cpu"

    @property
    def is_interpreted(self) -> bool:
        return self.backend == "triton" and not HAS_CUDA

    @property
    def tolerance(self) -> float:
        """The interpreter cuts fp32 to bf16 instead of rounding: one more unit in the last place."""
        twice = self.is_interpreted and self.dtype is torch.bfloat16
        return TOLERANCES[self.dtype] * (2 if twice else 1)

    def make(self, world: World) -> GroupedLora:
        if self.backend == "triton":
            pytest.importorskip("triton")
        backend = BACKENDS[self.backend].make(BackendResources(world.arena, world.slots, self.dtype))
        if self.backend == "triton":
            fill_scratch_with_nan(backend)
        return backend

    def limited(self, counts: list[int]) -> list[int]:
        """The same proportions in no more rows than the subject is fast with."""
        total = sum(counts)
        return [max(1, count * 64 // total) for count in counts] if self.is_interpreted and total > 64 else counts


def fill_scratch_with_nan(backend: object) -> None:
    """What is read of the scratch without having been written shows."""
    new_planes = backend._new_planes  # pyright: ignore
    backend._new_planes = lambda *shape: new_planes(*shape).fill_(float("nan"))  # pyright: ignore


SUBJECTS = [
    Subject(spec.name, dtype)
    for spec in BACKENDS.values()
    for dtype in spec.dtypes
    if spec.name != "reference" and (spec.requires is None or importlib.util.find_spec(spec.requires) is not None)
]
ON_CPU = [subject for subject in SUBJECTS if subject.backend != "triton"]
IN_TRITON = [subject for subject in SUBJECTS if subject.backend == "triton"]
every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


@dataclass
class World:
    """Adapters of given ranks per site in one arena."""

    group: SiteGroup
    arena: RankArena
    slots: SlotTable

    @classmethod
    def make(
        cls,
        ranks: list[list[int]],
        d_in: int,
        d_outs: list[int],
        seed: int = 0,
        subject: Subject | None = None,
        num_slots: int = 64,
    ) -> World:
        sites = tuple(Site(i, str(i), d_in, d, 0, per_sequence=False) for i, d in enumerate(d_outs))
        group = SiteGroup(0, d_in, sites)
        dtype = subject.dtype if subject is not None and subject.backend == "triton" else torch.float32
        device = "cpu" if subject is None else subject.device
        layout = BACKENDS["cpu" if subject is None else subject.backend].a_layout
        slots = SlotTable(len(sites), (group,), num_slots, layout)
        world = cls(group, RankArena(64 << 20, dtype, device), slots)
        world.arena.buffer[: 1 << 20].fill_(float("nan"))  # what is read without having been written shows
        generator = torch.Generator().manual_seed(seed)
        for of_site in ranks:
            world.add(of_site, generator)
        return world

    def add(self, ranks: list[int], generator: torch.Generator) -> int:
        places, column, layout = [], 0, self.slots.a_layout
        for site, rank in zip(self.group.sites, ranks, strict=True):
            places.append(SitePlacement(site.index, layout.place(column, site.d_in), 0, rank, 0.5 + rank / 7))
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

    def run(
        self, backend: GroupedLora, x: torch.Tensor, plan: LoraPlan, outs: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        outs = [out.clone() for out in outs]
        grouped_lora(backend, x, self.group, plan, dict(enumerate(outs)))
        return outs

    def exact(self, x: torch.Tensor, plan: LoraPlan, outs: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `run` should give, in fp64."""
        return self.run(ReferenceGroupedLora(self.arena), x.double(), plan, [out.double() for out in outs])

    def random(self, num_rows: int, subject: Subject, seed: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x and an output for each site."""
        generator = torch.Generator().manual_seed(seed)
        widths = [self.group.d_in, *(site.d_out for site in self.group.sites)]
        x, *outs = (torch.randn(num_rows, d, generator=generator).to(subject.device, subject.dtype) for d in widths)
        return x, outs


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    norm = float(exact.norm())
    return float((found.double() - exact).norm()) / (norm or 1.0)


def check(world: World, rows: list[tuple[int, int]], subject: Subject) -> None:
    plan = LoraPlan.build(world.slots, rows)
    x, outs = world.random(plan.num_rows, subject)
    exact = world.exact(x, plan, outs)
    backend = subject.make(world)
    found = world.run(backend, x, LoraPlan.build(world.slots, rows), outs)
    again = world.run(backend, x, LoraPlan.build(world.slots, rows), outs)
    for got, twice, want, before in zip(found, again, exact, outs, strict=True):
        assert torch.equal(got, twice), "not repeatable"
        assert relative_error(got, want) < subject.tolerance
        cursor = 0
        for slot, count in rows:
            if slot == BASE_SLOT:
                assert torch.equal(got[cursor : cursor + count], before[cursor : cursor + count]), "base rows changed"
            cursor += count
    if isinstance(backend, GroupLora) and plan.active(world.group):
        check_group(world, backend, LoraPlan.build(world.slots, rows), x, outs, exact, subject)


def check_group(
    world: World,
    backend: GroupLora,
    plan: LoraPlan,
    x: torch.Tensor,
    outs: list[torch.Tensor],
    exact: list[torch.Tensor],
    subject: Subject,
) -> None:
    """All sites at once, their outputs side by side."""
    whole = torch.cat(outs, 1)
    backend.expand_group(backend.shrink(x, world.group, plan), world.group, plan, whole)
    for got, want in zip(whole.split([out.shape[1] for out in outs], 1), exact, strict=True):
        assert relative_error(got, want) < subject.tolerance


ranks_of = st.lists(st.lists(st.sampled_from(RANKS), min_size=2, max_size=2), min_size=6, max_size=6)


def rows_of(longest: int) -> st.SearchStrategy[dict[int, int]]:
    return st.dictionaries(st.integers(-1, 5), st.integers(0, longest), max_size=7)


@settings(max_examples=60)
@given(ranks=ranks_of, rows=rows_of(40), d_in=st.sampled_from([16, 36, 52]))
@pytest.mark.parametrize("subject", ON_CPU, ids=str)
def test_any_mix_equals_the_reference(
    subject: Subject, ranks: list[list[int]], rows: dict[int, int], d_in: int
) -> None:
    check(World.make(ranks, d_in, [d_in, 20], subject=subject), list(rows.items()), subject)


@settings(max_examples=12)
@given(ranks=ranks_of, rows=rows_of(20), d_in=st.sampled_from([16, 36, 52]))
@pytest.mark.parametrize("subject", IN_TRITON, ids=str)
def test_any_mix_equals_the_reference_in_triton(
    subject: Subject, ranks: list[list[int]], rows: dict[int, int], d_in: int
) -> None:
    counts = subject.limited(list(rows.values()))
    check(World.make(ranks, d_in, [d_in, 20], subject=subject), list(zip(rows, counts, strict=True)), subject)


@every_subject
@pytest.mark.parametrize("num_slices", [1, 2, 3])
@pytest.mark.parametrize(
    "counts", [[1] * 8, [4] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [40] * 8, [2, 200, 2, 300, 2, 2, 2, 17]]
)
def test_all_ranks_in_one_call(subject: Subject, num_slices: int, counts: list[int]) -> None:
    ranks = [[RANKS[(i + s) % len(RANKS)] for s in range(num_slices)] for i in range(8)]
    world = World.make(ranks, 52, [32, 48, 20][:num_slices], subject=subject)
    check(world, list(enumerate(subject.limited(counts))), subject)


@pytest.mark.parametrize(
    "subject", [*ON_CPU, *(pytest.param(subject, marks=pytest.mark.gpu) for subject in IN_TRITON)], ids=str
)
def test_thousands_of_tokens(subject: Subject) -> None:
    ranks = [[RANKS[i % len(RANKS)], RANKS[(i + 3) % len(RANKS)]] for i in range(32)]
    rows = [(BASE_SLOT, 7), *((slot, 1 + slot * 8) for slot in range(31)), (31, 338)]
    assert sum(count for _, count in rows) == 4096
    check(World.make(ranks, 200, [96, 36], subject=subject), rows, subject)


@every_subject
@pytest.mark.parametrize("num_rows", [0, 5])
def test_a_batch_of_the_base_alone_is_untouched(subject: Subject, num_rows: int) -> None:
    check(World.make([[8]], 32, [32], subject=subject), [(BASE_SLOT, num_rows)], subject)


@every_subject
def test_base_rows_between_short_segments_keep_their_bits(subject: Subject) -> None:
    world = World.make([[8], [8], [8], [8], [8]], 32, [32], subject=subject)
    check(world, [(0, 2), (BASE_SLOT, 3), (1, 2), (2, 2), (BASE_SLOT, 1), (3, 2), (4, 2)], subject)


@every_subject
def test_the_last_slot_of_the_table(subject: Subject) -> None:
    world = World.make([[8], [3], [16]], 36, [20], subject=subject, num_slots=3)
    check(world, [(2, 9), (0, 1)], subject)


@every_subject
@pytest.mark.parametrize(
    "view", ["columns of wider rows", "columns at an odd address", "every other row", "transposed"]
)
def test_an_input_that_is_not_contiguous(subject: Subject, view: str) -> None:
    world = World.make([[8, 3], [0, 16]], 36, [32, 20], subject=subject)
    plan = LoraPlan.build(world.slots, [(0, 5), (BASE_SLOT, 1), (1, 6)])
    x, outs = world.random(12, subject)
    wide = torch.full((24, 96), float("nan"), dtype=x.dtype, device=x.device)
    views = {
        "columns of wider rows": wide[:12, 16:52],
        "columns at an odd address": wide[:12, 3:39],
        "every other row": wide[::2, :36],
        "transposed": wide.view(48, 48)[:36, :12].t(),
    }
    views[view].copy_(x)
    found = world.run(subject.make(world), views[view], plan, outs)
    for got, want in zip(found, world.exact(x, plan, outs), strict=True):
        assert relative_error(got, want) < subject.tolerance


@every_subject
@pytest.mark.parametrize("view", ["one row of a column", "one row again and again"])
def test_an_input_whose_rows_are_closer_than_they_are_long(subject: Subject, view: str) -> None:
    """A product whose rows overlap is refused by some libraries without a word."""
    num_rows = 1 if view == "one row of a column" else 7
    world = World.make([[8, 3]], 36, [32, 20], subject=subject)
    plan = LoraPlan.build(world.slots, [(0, num_rows)])
    row, outs = world.random(1, subject)
    outs = [out.expand(num_rows, -1).clone() for out in outs]
    x = row.as_strided(row.shape, (1, 1)) if num_rows == 1 else row.expand(num_rows, -1)
    assert x.stride(0) < x.shape[1]
    found = world.run(subject.make(world), x, plan, outs)
    for got, want in zip(found, world.exact(x, plan, outs), strict=True):
        assert relative_error(got, want) < subject.tolerance


@every_subject
def test_a_wrong_adapter_is_caught_by_the_comparison(subject: Subject) -> None:
    world = World.make([[8], [8]], 32, [32], subject=subject)
    x, outs = world.random(10, subject)
    backend = subject.make(world)
    exact = world.exact(x, LoraPlan.build(world.slots, [(0, 5), (1, 5)]), outs)[0]
    right = world.run(backend, x, LoraPlan.build(world.slots, [(0, 5), (1, 5)]), outs)[0]
    swapped = world.run(backend, x, LoraPlan.build(world.slots, [(1, 5), (0, 5)]), outs)[0]
    assert relative_error(right, exact) < subject.tolerance
    assert relative_error(swapped, exact) > 10 * subject.tolerance


@every_subject
def test_a_slot_used_again_gives_the_new_adapters_answer(subject: Subject) -> None:
    """What is cached is keyed by generation, so a new adapter in an old slot is never answered by it."""
    world = World.make([[8]] * 5, 32, [32], subject=subject)
    backend = subject.make(world)
    x, outs = world.random(10, subject)
    rows = [(slot, 2) for slot in range(5)]
    world.run(backend, x, LoraPlan.build(world.slots, rows), outs)
    world.slots.release(2)
    assert world.add([8], torch.Generator().manual_seed(99)) == 2
    plan = LoraPlan.build(world.slots, rows)
    exact = world.exact(x, plan, outs)[0]
    assert relative_error(world.run(backend, x, plan, outs)[0], exact) < subject.tolerance


@every_subject
def test_the_same_row_in_batches_of_different_size_agrees(subject: Subject) -> None:
    world = World.make([[16]] * 6, 48, [48], subject=subject)
    backend = subject.make(world)
    x, outs = world.random(600, subject)
    alone = world.run(backend, x[:3], LoraPlan.build(world.slots, [(0, 3)]), [outs[0][:3]])[0]
    for others in ([(1, 3), (2, 3), (3, 3)], [(1, 300)], [(1, 1), (2, 2), (3, 40), (4, 5), (5, 6)]):
        counts = [3, *subject.limited([count for _, count in others])]
        total = sum(counts)
        rows = list(zip([0, *(slot for slot, _ in others)], counts, strict=True))
        found = world.run(backend, x[:total], LoraPlan.build(world.slots, rows), [outs[0][:total]])[0]
        assert relative_error(found[:3], alone.double()) < subject.tolerance


@every_subject
def test_a_moved_adapter_answers_from_its_new_place(subject: Subject) -> None:
    world = World.make([[8], [8]], 32, [32], subject=subject)
    backend = subject.make(world)
    x, outs = world.random(10, subject)
    before = world.run(backend, x, LoraPlan.build(world.slots, [(1, 10)]), outs)[0]
    first, second = (run for run in sorted(world.arena._used.values()))
    world.slots.release(0)
    world.arena.free(first)
    moved = world.arena.move_down(second)
    world.slots.move(1, moved)
    world.arena.buffer[moved.end :].fill_(float("nan"))
    assert moved.offset < second.offset
    assert torch.equal(world.run(backend, x, LoraPlan.build(world.slots, [(1, 10)]), outs)[0], before)


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
