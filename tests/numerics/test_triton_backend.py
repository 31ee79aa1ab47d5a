"""The Triton backend beyond the mathematics of one call: graphs, specialisations, block sizes, and what compiles.

Without a CUDA device launches run in Triton's interpreter; what an accelerator alone can show is marked `gpu`.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs

from lora_runtime.arena import BASE_SLOT, RankArena
from lora_runtime.kernels.grouped_lora import LoraPlan, grouped_lora
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.kernels.grouped_lora.triton_backend import backend as backend_module
from lora_runtime.kernels.grouped_lora.triton_backend import kernels
from lora_runtime.kernels.grouped_lora.triton_backend.backend import TritonGroupedLora
from lora_runtime.kernels.grouped_lora.triton_backend.compiles import CompileCounter, num_compiled
from lora_runtime.kernels.grouped_lora.triton_backend.tiles import TileList
from lora_runtime.kernels.grouped_lora.triton_backend.tuning import (
    RANK_BUCKETS,
    TOKEN_BUCKETS,
    ExpandConfig,
    ShrinkConfig,
    TuningTable,
)
from tests.property.test_grouped_lora import Subject, World, fill_scratch_with_nan, relative_error
from tests.unit.test_triton_tiles import GROUPS, publish, table

FP32, FP16, BF16 = (Subject("triton", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
RANKS = [[8, 3], [0, 16], [1, 0], [17, 40]]
Call = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


@dataclass
class Launches:
    """Kernel calls as they were made, to be made again: what a CUDA graph holds of them."""

    calls: list[Call] = field(default_factory=list[Call])
    run: bool = True

    def __call__(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            self.calls.append((kernel, grid, args, constants))
            if self.run:
                kernel[grid](*args, **constants)

        return launch

    def replay(self) -> None:
        for kernel, grid, args, constants in self.calls:
            kernel[grid](*args, **constants)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    recorded = Launches()
    monkeypatch.setattr(backend_module, "_launch", recorded)
    return recorded


def made(world: World, tuning: TuningTable | None = None) -> TritonGroupedLora:
    backend = TritonGroupedLora(world.arena, world.slots, tuning)
    fill_scratch_with_nan(backend)
    return backend


def check(found: list[torch.Tensor], exact: list[torch.Tensor], subject: Subject) -> None:
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, want) < subject.tolerance


@dataclass(frozen=True)
class Replays:
    """What was captured once: `x` into `static`, which hold `outs` before each replay."""

    world: World
    backend: TritonGroupedLora
    tiles: TileList
    x: torch.Tensor
    outs: list[torch.Tensor]
    static: list[torch.Tensor]


def check_replays(
    captured: Replays, batches: list[list[tuple[int, int]]], replay: Callable[[], object], subject: Subject
) -> None:
    """Replay each batch; before the last, which is slot 2's, that slot is used again."""
    world = captured.world
    for rows in batches:
        if rows is batches[-1]:
            world.slots.release(2)
            assert world.add([3, 8], torch.Generator().manual_seed(5)) == 2
        now = LoraPlan.build(world.slots, rows)
        for target, out in zip(captured.static, captured.outs, strict=True):
            target.copy_(out)
        captured.backend.device_slots.refresh()
        captured.tiles.fill(now)
        replay()
        check(captured.static, world.exact(captured.x, now, captured.outs), subject)
        last = max((segment.end for segment in now.segments), default=0)
        assert all(torch.equal(a[last:], b[last:]) for a, b in zip(captured.static, captured.outs, strict=True))


SPLITS = [(16, 16, 1), (16, 16, 4), (32, 32, 3), (64, 16, 7), (16, 32, 2)]


@pytest.mark.parametrize(("block_rank", "block_in", "split"), SPLITS)
def test_any_split_and_block_sizes_give_the_same(block_rank: int, block_in: int, split: int) -> None:
    """Parts of d_in that are empty (seven of sixteen columns each) still write their planes."""
    shrink = ShrinkConfig(block_rank=block_rank, block_in=block_in, split=split, num_warps=4, num_stages=2)
    expand = ExpandConfig(block_rank=block_rank, block_out=block_in, num_warps=4, num_stages=2)
    tuning = TuningTable({16: 16}, {(52, 64, 16): shrink}, {(36, 64, 16): expand, (20, 64, 16): expand})
    world = World.make(RANKS, 52, [36, 20], subject=FP32)
    rows = [(0, 5), (3, 6), (BASE_SLOT, 2), (1, 2), (2, 1)]
    x, outs = world.random(16, FP32)
    found = world.run(made(world, tuning), x, LoraPlan.build(world.slots, rows), outs)
    check(found, world.exact(x, LoraPlan.build(world.slots, rows), outs), FP32)


def test_one_list_serves_many_adapters_none_and_many_again_as_under_a_graph(launches: Launches) -> None:
    """Captured with one adapter that has no matrix at one site; the launches recorded then are made again."""
    world = World.make(RANKS, 36, [32, 20], subject=FP32)
    backend = made(world)
    tiles = TileList(6, 16, world.arena.buffer.device, max_rank=40)
    plan = tiles.static_plan(world.slots, 24)
    x, outs = world.random(24, FP32)
    static = [out.clone() for out in outs]
    tiles.fill(LoraPlan.build(world.slots, [(1, 4)]))
    grouped_lora(backend, x, world.group, plan, dict(enumerate(static)))
    batches = [[(0, 5), (1, 2), (3, 9)], [], [(BASE_SLOT, 24)], [(3, 17), (0, 1), (2, 6)], [(2, 24)]]
    check_replays(Replays(world, backend, tiles, x, outs, static), batches, launches.replay, FP32)
    assert backend.device_slots.generation == 0


def test_rows_beyond_the_plans_are_not_touched() -> None:
    world = World.make(RANKS, 36, [32, 20], subject=FP32)
    plan = LoraPlan.build(world.slots, [(0, 5), (3, 4)])
    x, outs = world.random(16, FP32)
    x[9:] = float("nan")
    found = world.run(made(world), x, plan, outs)
    check([out[:9] for out in found], world.exact(x[:9], plan, [out[:9] for out in outs]), FP32)
    assert all(torch.equal(got[9:], out[9:]) for got, out in zip(found, outs, strict=True))


@pytest.mark.parametrize("view", ["columns of wider rows", "columns at an odd address", "transposed"])
def test_an_output_that_is_not_contiguous_is_written_in_place(view: str) -> None:
    world = World.make([[8], [16]], 36, [20], subject=FP16)
    plan = LoraPlan.build(world.slots, [(0, 5), (BASE_SLOT, 1), (1, 6)])
    x, (out,) = world.random(12, FP16)
    around = torch.full((48, 48), 7.0, dtype=out.dtype, device=out.device)
    target = {"columns of wider rows": around[:12, 16:36], "columns at an odd address": around[:12, 3:23],
              "transposed": around[:20, :12].t()}[view]  # fmt: skip
    target.copy_(out)
    grouped_lora(made(world), x, world.group, plan, {0: target})
    check([target], world.exact(x, plan, [out]), FP16)
    assert int((around == 7.0).sum()) >= 48 * 48 - out.numel(), "what lies beside it changed"
    assert torch.equal(target[5], out[5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_may_be_kept_in_another_precision_than_the_activations(dtype: torch.dtype) -> None:
    subject = Subject("triton", dtype)
    world = World.make(RANKS, 36, [32, 20], subject=FP32)
    plan = LoraPlan.build(world.slots, [(0, 5), (3, 4), (1, 2)])
    x, outs = world.random(11, subject)
    check(world.run(made(world), x, plan, outs), world.exact(x, plan, outs), subject)


def test_a_product_beyond_the_range_of_half_precision_does_not_overflow() -> None:
    """x A^T is 2^18 here, B 2^-16: the delta is a small number."""
    world = World.make([[8]], 64, [32], subject=FP16)
    a_offset, b_offset, _, scaling = world.slots.entry(0, 0)
    world.arena.buffer[a_offset : a_offset + 8 * 64] = 64.0
    world.arena.buffer[b_offset : b_offset + 8 * 32] = 2.0**-16
    x = torch.full((3, 64), 64.0, dtype=torch.float16, device=FP16.device)
    out = torch.zeros(3, 32, dtype=torch.float16, device=FP16.device)
    found = world.run(made(world), x, LoraPlan.build(world.slots, [(0, 3)]), [out])[0]
    torch.testing.assert_close(found, torch.full_like(found, scaling * 8 * 2.0**18 * 2.0**-16), rtol=1e-3, atol=0)


def test_groups_whose_sites_lie_between_each_other_keep_to_their_own() -> None:
    """Sites 0 and 2 share an input, site 1 has another; each adapter lacks some of them."""
    slots, arena = table(num_slots=3), RankArena(1 << 20, FP32.dtype, FP32.device)
    arena.buffer.copy_(torch.randn(arena.buffer.shape) / 8)
    for i, ranks in enumerate([(8, 3, 16), (0, 20, 1), (4, 0, 0)]):
        publish(slots, *ranks, offset=8192 * i)
    backend, reference = TritonGroupedLora(arena, slots), ReferenceGroupedLora(arena)
    fill_scratch_with_nan(backend)
    plan = LoraPlan.build(slots, [(1, 5), (BASE_SLOT, 2), (2, 3), (0, 4)])
    for group in GROUPS:
        x = torch.randn(14, group.d_in, device=FP32.device)
        outs = {site.index: torch.randn(14, site.d_out, device=FP32.device) for site in group.sites}
        exact = {index: out.double() for index, out in outs.items()}
        grouped_lora(backend, x, group, plan, outs)
        grouped_lora(reference, x.double(), group, plan, exact)
        check(list(outs.values()), list(exact.values()), FP32)


def test_a_growing_slot_table_is_followed_between_batches() -> None:
    world = World.make([[8, 3]] * 2, 36, [32, 20], subject=FP32, num_slots=2)
    backend = made(world)
    for i in range(7):
        world.add([3 + i, 8], torch.Generator().manual_seed(i))
        plan = LoraPlan.build(world.slots, [(world.slots.num_slots - 1, 0), (i + 2, 3), (0, 2)])
        x, outs = world.random(5, FP32, seed=i)
        check(world.run(backend, x, plan, outs), world.exact(x, plan, outs), FP32)
    assert backend.device_slots.generation > 0


def specialisation(call: Call) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for: constants, dtypes, and whether a pointer or number divides by 16."""
    kernel, _, args, constants = call
    names = list(inspect.signature(kernel.fn).parameters)
    key: list[Any] = [kernel.fn.__name__, *sorted(constants.items())]
    for name, value in zip(names, args, strict=False):
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif name not in kernels.COUNTS:
            key.append((name, value == 1, value % 16 == 0))
    return tuple(key)


@pytest.mark.parametrize("d_in", [48, 36])
def test_no_batch_needs_a_kernel_that_the_warm_up_did_not_launch(launches: Launches, d_in: int) -> None:
    world = World.make([[8, 3], [0, 16], [1, 0], [130, 140], [300, 0]], d_in, [32, 20], subject=FP16)
    backend = made(world)
    backend.warm_up([world.group], [torch.float16])
    known = set(map(specialisation, launches.calls))
    launches.calls.clear()
    launches.run = False
    for num_rows in (1, 2, 15, 16, 17, 63, 64, 200, 256, 1000, 1024, 4096, 5000):
        for slot in range(5):
            x, outs = world.random(num_rows, FP16)
            wide = torch.zeros(num_rows, 2 * d_in + 9, dtype=x.dtype, device=x.device)
            plan = LoraPlan.build(world.slots, [(slot, num_rows - num_rows // 2), (0, num_rows // 2)])
            for given in (x, wide[:, :d_in], wide[:, 1 : d_in + 1], wide[:, ::2][:, :d_in], x[:1].expand(num_rows, -1)):
                grouped_lora(backend, given, world.group, plan, dict(enumerate(outs)))
    assert len(launches.calls) == 13 * 5 * 5 * 3
    assert set(map(specialisation, launches.calls)) <= known


def test_a_warm_up_covers_every_bucket_and_touches_nothing(launches: Launches) -> None:
    world = World.make([[8, 3]], 48, [32, 20], subject=FP16)
    before = world.arena.buffer.clone()
    made(world).warm_up([world.group], [torch.float16, torch.float32])
    each = 1 + 2 + 1  # the shrink, each site, both together
    assert len(launches.calls) == 2 * len(TOKEN_BUCKETS) * len(RANK_BUCKETS) * each
    assert torch.equal(before.view(torch.int16), world.arena.buffer.view(torch.int16))


def test_the_counter_counts_our_kernels_and_passes_on_to_the_hook_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, key: seen.append((fn.module, key)))
    counter = CompileCounter()
    hook: Any = knobs.runtime.jit_post_compile_hook
    for module in (kernels.__name__, "somebody.elses", kernels.__name__):
        hook(fn=SimpleNamespace(module=module), key="k")
    assert counter.count == 2
    assert seen == [(module, "k") for module in (kernels.__name__, "somebody.elses", kernels.__name__)]


def compiled(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.numerics.compile_kernels", *arguments]
    environ = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, "it would be an error in the tests of a machine with a GPU"
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_compiler_has_nothing_to_do_after_the_warm_up() -> None:
    found = compiled("warm", "90", "float16", "float16")
    assert found["num_compiled"] == found["warmed"] > 4


TARGETS = [
    (90, "bfloat16", "bfloat16", "bf16.bf16", "tf32.tf32"),
    pytest.param(90, "float32", "float32", "", "", marks=pytest.mark.slow),
    pytest.param(80, "float16", "float16", "f16.f16", "tf32.tf32", marks=pytest.mark.slow),
    pytest.param(80, "bfloat16", "float32", "", "", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("capability", "activations", "arena", "shrink", "expand"), TARGETS)
def test_what_is_launched_compiles_for_a_gpu_that_is_not_here(
    capability: int, activations: str, arena: str, shrink: str, expand: str
) -> None:
    """Tensor cores where both operands are in half precision, none where fp32 is to stay exact; no atomics.

    Batches of 1, 3, 5, 7 and 16 rows at groups 0, 1, 2, 16 and 17 share two kernels; one of 5,000 rows has its own.
    """
    found = compiled("examine", str(capability), activations, arena)
    assert found["num_compiled"] == [2, 2, 4]
    for name, wanted in (("shrink", shrink), ("expand", expand)):
        instructions = found[name]["mma"]
        assert bool(instructions) == bool(wanted), instructions
        assert all(wanted in instruction for instruction in instructions), instructions
        assert found[name]["atomics"] == 0
        assert found[name]["wide_loads"] > 0
        assert 0 < found[name]["shared"] <= 99 << 10
        assert found[name]["machine_code"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_captured_graph_serves_many_adapters_none_and_many_again(dtype: torch.dtype) -> None:
    subject = Subject("triton", dtype)
    world = World.make(RANKS, 768, [768, 256], subject=subject)
    backend = TritonGroupedLora(world.arena, world.slots)
    tiles = TileList(24, 16, world.arena.buffer.device, max_rank=40)
    plan = tiles.static_plan(world.slots, 64)
    x, outs = world.random(64, subject)
    static = [out.clone() for out in outs]
    tiles.fill(LoraPlan.build(world.slots, [(1, 4)]))
    backend.warm_up([world.group], [dtype])
    backend.prepare(plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_lora(backend, x, world.group, plan, dict(enumerate(static)))
    batches = [[(0, 5), (1, 20), (3, 9)], [], [(BASE_SLOT, 64)], [(3, 17), (0, 1), (2, 46)], [(2, 64)]]
    check_replays(Replays(world, backend, tiles, x, outs, static), batches, graph.replay, subject)


@pytest.mark.gpu
def test_nothing_is_compiled_after_the_warm_up() -> None:
    world = World.make([[8, 3], [0, 16], [130, 140], [300, 0]], 768, [768, 200], subject=BF16)
    backend = TritonGroupedLora(world.arena, world.slots)
    assert backend.warm_up([world.group], [torch.bfloat16]) > 0
    before = num_compiled()
    for num_rows in (1, 16, 17, 64, 1000, 4096, 9000):
        for slot in range(4):
            x, outs = world.random(num_rows, BF16)
            plan = LoraPlan.build(world.slots, [(slot, num_rows - num_rows // 2), (0, num_rows // 2)])
            for given in (x, torch.cat([x, x], 1)[:, 1:769], x[:1].expand(num_rows, -1)):
                grouped_lora(backend, given, world.group, plan, dict(enumerate(outs)))
    torch.cuda.synchronize()
    assert num_compiled() == before


@pytest.mark.gpu
def test_a_step_waits_for_nothing() -> None:
    """Filling a list, refreshing slots and both launches are queued without a synchronisation."""
    world = World.make(RANKS, 768, [768, 256], subject=BF16)
    backend = TritonGroupedLora(world.arena, world.slots)
    x, outs = world.random(40, BF16)
    grouped_lora(backend, x, world.group, LoraPlan.build(world.slots, [(0, 40)]), dict(enumerate(outs)))
    world.slots.release(2)
    world.add([3, 8], torch.Generator().manual_seed(5))
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_lora(backend, x, world.group, LoraPlan.build(world.slots, [(0, 9), (2, 31)]), dict(enumerate(outs)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """Elements past 2^31 of x, of out and of the arena."""
    world = World.make([[8]], 65536, [65536], subject=BF16)
    world.arena = RankArena(5 << 30, torch.bfloat16, "cuda")
    world.arena.allocate((2 << 30) + 4096)
    world.slots.release(0)
    slot = world.add([8], torch.Generator().manual_seed(3))
    num_rows = (1 << 15) + 64
    x = torch.randn(num_rows, 65536, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(num_rows, 65536, device="cuda", dtype=torch.bfloat16)
    plan = LoraPlan.build(world.slots, [(BASE_SLOT, num_rows - 32), (slot, 32)])
    grouped_lora(TritonGroupedLora(world.arena, world.slots), x, world.group, plan, {0: out})
    tail = LoraPlan.build(world.slots, [(slot, 32)])
    exact = torch.zeros(32, 65536, device="cuda", dtype=torch.float64)
    grouped_lora(ReferenceGroupedLora(world.arena), x[-32:].double(), world.group, tail, {0: exact})
    assert relative_error(out[-32:], exact) < BF16.tolerance
    assert not out[:-32].any()
