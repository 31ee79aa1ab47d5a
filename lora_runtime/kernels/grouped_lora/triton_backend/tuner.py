"""Finding block sizes on the present device: each candidate is compared with the reference, then timed.

One shape, rank and number of tokens at a time; the shrink is chosen first, by the time of the whole op, then the
expand. Rows of a tile are chosen for each token bucket over all shapes and ranks, since all sites share the tiles.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from itertools import product
from typing import Literal, cast

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from lora_runtime.arena import ALayout, RankArena, SitePlacement, SlotTable, align
from lora_runtime.kernels.grouped_lora.api import LoraPlan, grouped_lora
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.kernels.grouped_lora.registry import TOLERANCES
from lora_runtime.kernels.grouped_lora.triton_backend.backend import TritonGroupedLora
from lora_runtime.kernels.grouped_lora.triton_backend.tuning import (
    ExpandConfig,
    ExpandEntry,
    ShrinkConfig,
    ShrinkEntry,
    TableFile,
    TuningTable,
)
from lora_runtime.kernels.interpreting import IS_INTERPRETED
from lora_runtime.types import Site, SiteGroup

TILE_ROWS = (16, 32, 64)
_MAX_ADAPTERS = 32
Name = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Case:
    """What is tuned for: one projection, at the largest rank and number of tokens of two buckets."""

    d_in: int
    d_out: int
    rank: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.d_in} → {self.d_out}, rank {self.rank}, {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the op."""

    tile_rows: int
    shrink: ShrinkConfig
    expand: ExpandConfig


@dataclass(frozen=True, slots=True)
class Timed:
    """The fastest candidate of a case with tiles of some height, and seconds of one op."""

    case: Case
    candidate: Candidate
    seconds: float


class OutputDiffers(Exception):
    """A candidate's output is not the reference's: nothing it does is timed."""


@dataclass(slots=True)
class Workload:
    """A batch of one case: random adapters of its rank, tokens shared out evenly, in order."""

    case: Case
    device: torch.device
    dtype: torch.dtype
    group: SiteGroup = field(init=False)
    arena: RankArena = field(init=False)
    slots: SlotTable = field(init=False)
    x: torch.Tensor = field(init=False)
    before: torch.Tensor = field(init=False)
    exact: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        self.group = SiteGroup(0, case.d_in, (Site(0, "tuned", case.d_in, case.d_out, 0, per_sequence=False),))
        num_adapters = min(case.tokens, _MAX_ADAPTERS)
        b_offset = align(case.rank * case.d_in)
        num_elements = align(b_offset + case.rank * case.d_out)
        self.arena = RankArena(num_adapters * num_elements * self.dtype.itemsize, self.dtype, str(self.device))
        self.slots = SlotTable(1, (self.group,), num_adapters, ALayout.RANK_ROWS)
        generator = torch.Generator().manual_seed(0)
        for _ in range(num_adapters):
            run = self.arena.allocate(num_elements)
            self.arena.view(run).copy_(torch.randn(num_elements, generator=generator) / 8)
            self.slots.publish(self.slots.acquire(), run, (SitePlacement(0, 0, b_offset, case.rank, 1.0),))
        self.x, self.before = (
            torch.randn(case.tokens, d, generator=generator).to(self.device, self.dtype)
            for d in (case.d_in, case.d_out)
        )
        self.exact = self.before.double()
        grouped_lora(ReferenceGroupedLora(self.arena), self.x.double(), self.group, self.plan(), {0: self.exact})

    def plan(self) -> LoraPlan:
        n = self.slots.num_slots
        counts = [self.case.tokens // n + (i < self.case.tokens % n) for i in range(n)]
        return LoraPlan.build(self.slots, list(enumerate(counts)))

    def op(self, candidate: Candidate) -> Callable[[], torch.Tensor]:
        """The whole op as one call, with its tiles made; returns `out`, which every call adds to."""
        case = self.case
        table = TuningTable(
            {case.tokens: candidate.tile_rows},
            {(case.d_in, case.rank, case.tokens): candidate.shrink},
            {(case.d_out, case.rank, case.tokens): candidate.expand},
        )
        backend = TritonGroupedLora(self.arena, self.slots, table)
        plan, out = self.plan(), self.before.clone()
        backend.prepare(plan)

        def run() -> torch.Tensor:
            grouped_lora(backend, self.x, self.group, plan, {0: out})
            return out

        return run

    def error(self, candidate: Candidate) -> float:
        """Relative Frobenius error of one op against fp64."""
        return float((self.op(candidate)().double() - self.exact).norm() / self.exact.norm())

    def check(self, candidate: Candidate) -> float:
        """The error; raises OutputDiffers where it is above the dtype's tolerance."""
        error = self.error(candidate)
        tolerance = TOLERANCES[self.dtype]
        if IS_INTERPRETED and self.dtype is torch.bfloat16:
            tolerance *= 2  # the interpreter cuts fp32 to bf16 instead of rounding
        if not error < tolerance:  # NaN neither
            raise OutputDiffers(f"{self.case}: error {error:.1e} with {candidate}")
        return error

    def seconds(self, candidate: Candidate) -> float:
        """Of one op on a CUDA device, the median, after its output was checked; infinite where it does not fit."""
        try:
            self.check(candidate)
        except OutOfResources:
            return float("inf")
        times = cast("list[float]", do_bench(self.op(candidate), warmup=5, rep=20, return_mode="all"))
        return statistics.median(times) / 1e3


def first_candidate(case: Case, tile_rows: int | None = None) -> Candidate:
    """The defaults."""
    table = TuningTable()
    return Candidate(
        tile_rows or table.tile_rows_for(case.tokens),
        table.shrink_for(case.d_in, case.rank, case.tokens),
        table.expand_for(case.d_out, case.rank, case.tokens),
    )


def shrink_candidates(case: Case) -> Iterator[ShrinkConfig]:
    """What is tried of the shrink: parts of d_in no shorter than a block."""
    ranks = sorted({min(case.rank, block) for block in (16, 64)})
    for block_rank, block_in, split, num_warps, num_stages in product(
        ranks, (32, 64, 128, 256), (1, 2, 4, 8), (2, 4, 8), (2, 3)
    ):
        if split == 1 or split * block_in <= case.d_in:
            yield ShrinkConfig(
                block_rank=block_rank, block_in=block_in, split=split, num_warps=num_warps, num_stages=num_stages
            )


def expand_candidates(case: Case) -> Iterator[ExpandConfig]:
    """What is tried of the expand."""
    ranks = sorted({min(case.rank, block) for block in (16, 32, 64)})
    for block_rank, block_out, num_warps, num_stages in product(ranks, (32, 64, 128, 256), (2, 4, 8), (1, 2)):
        yield ExpandConfig(block_rank=block_rank, block_out=block_out, num_warps=num_warps, num_stages=num_stages)


def tune_case(workload: Workload, tile_rows: int, seconds: Callable[[Candidate], float] | None = None) -> Timed:
    """The fastest shrink, then the fastest expand with it; `seconds` is how a candidate is timed."""
    seconds = seconds or workload.seconds
    case = workload.case
    best = first_candidate(case, tile_rows)
    best_seconds = seconds(best)
    for shrink in shrink_candidates(case):
        tried = Candidate(tile_rows, shrink, best.expand)
        if (taken := seconds(tried)) < best_seconds:
            best, best_seconds = tried, taken
    for expand in expand_candidates(case):
        tried = Candidate(tile_rows, best.shrink, expand)
        if (taken := seconds(tried)) < best_seconds:
            best, best_seconds = tried, taken
    return Timed(case, best, best_seconds)


def tune(cases: list[Case], device: torch.device, dtype: torch.dtype, progress: Callable[[str], None]) -> list[Timed]:
    """Each case at each height of tiles; raises OutputDiffers when a candidate answers wrongly."""
    timed: list[Timed] = []
    for number, case in enumerate(cases, 1):
        workload = Workload(case, device, dtype)
        for tile_rows in TILE_ROWS:
            progress(f"{number} of {len(cases)}: {case}, tiles of {tile_rows} rows")
            timed.append(tune_case(workload, tile_rows))
    return timed


def choose(timed: list[Timed]) -> dict[int, list[Timed]]:
    """By token bucket, the results with the height of tiles that takes the least time over all its cases.

    Cases count alike: each by its time over its own fastest.
    """
    fastest: dict[Case, float] = {}
    for one in timed:
        fastest[one.case] = min(one.seconds, fastest.get(one.case, one.seconds))
    cost: dict[tuple[int, int], float] = defaultdict(float)
    for one in timed:
        cost[one.case.tokens, one.candidate.tile_rows] += one.seconds / fastest[one.case]
    chosen: dict[int, list[Timed]] = {}
    for tokens in sorted({tokens for tokens, _ in cost}):
        tile_rows = min((rows for t, rows in cost if t == tokens), key=lambda rows: cost[tokens, rows])
        chosen[tokens] = [t for t in timed if (t.case.tokens, t.candidate.tile_rows) == (tokens, tile_rows)]
    return chosen


def table_of(timed: list[Timed], device: str, capability: str, dtype: torch.dtype) -> TableFile:
    """What `choose` chose, as a file. Of cases with the same d_in (or d_out) the one with most columns decides."""
    chosen = choose(timed)
    shrink: dict[tuple[int, int, int], ShrinkEntry] = {}
    expand: dict[tuple[int, int, int], ExpandEntry] = {}
    for one in sorted((t for results in chosen.values() for t in results), key=lambda t: t.case.d_in * t.case.d_out):
        case = one.case
        shrink[case.d_in, case.rank, case.tokens] = ShrinkEntry(
            d_in=case.d_in, rank=case.rank, tokens=case.tokens, **_fields(one.candidate.shrink)
        )
        expand[case.d_out, case.rank, case.tokens] = ExpandEntry(
            d_out=case.d_out, rank=case.rank, tokens=case.tokens, **_fields(one.candidate.expand)
        )
    return TableFile(
        device=device,
        capability=capability,
        dtype=cast("Name", str(dtype).removeprefix("torch.")),
        versions={"triton": triton.__version__, "torch": torch.__version__, "multilora": metadata.version("multilora")},
        tile_rows={str(tokens): results[0].candidate.tile_rows for tokens, results in chosen.items()},
        shrink=[shrink[key] for key in sorted(shrink)],
        expand=[expand[key] for key in sorted(expand)],
    )


def _fields(config: ShrinkConfig | ExpandConfig) -> dict[str, int]:
    return config.model_dump()
