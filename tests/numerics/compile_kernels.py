"""Compiles what the backend launches, for a GPU that need not be there, and prints what came of it as JSON.

A process of its own: in the tests' process Triton may be an interpreter. A stand-in for Triton's driver says what the
device is; kernels are compiled to machine code by their real calls, and not launched.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from lora_runtime.arena import BASE_SLOT, ALayout, RankArena, Run, SitePlacement, SlotTable
from lora_runtime.kernels.grouped_lora import LoraPlan, grouped_lora
from lora_runtime.kernels.grouped_lora.triton_backend import backend as backend_module
from lora_runtime.kernels.grouped_lora.triton_backend.backend import TritonGroupedLora
from lora_runtime.kernels.grouped_lora.triton_backend.compiles import num_compiled
from lora_runtime.types import Site, SiteGroup

RANK, WIDTH = 16, 768


class Device:
    """As much of Triton's driver as a compilation asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def facts(kernel: Any) -> dict[str, Any]:
    """Shared memory in bytes, matrix instructions and memory accesses of one compiled kernel."""
    ptx = kernel.asm["ptx"]
    return {
        "shared": kernel.metadata.shared,
        "mma": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync[\w.:]*", ptx))),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "wide_loads": len(re.findall(r"ld\.global[\w.]*\.v4|cp\.async[\w.:]* .*0x10", ptx)),
        "machine_code": len(kernel.asm["cubin"]),
    }


def compile_only(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What the backend launches with, here."""

    def launch(*args: Any, **constants: Any) -> None:
        compiled[kernel.fn.__name__] = kernel.warmup(*args, grid=grid, **constants)

    return launch


compiled: dict[str, Any] = {}  # the last one of each name


class Batches:
    """Batches of one adapter of rank 16 at 18 sites of their own inputs."""

    def __init__(self, dtype: torch.dtype, arena_dtype: torch.dtype) -> None:
        self.dtype = dtype
        sites = tuple(Site(i, str(i), WIDTH, WIDTH, i, per_sequence=False) for i in range(18))
        self.groups = tuple(SiteGroup(site.index, WIDTH, (site,)) for site in sites)
        self.slots, arena = (
            SlotTable(len(sites), self.groups, a_layout=ALayout.RANK_ROWS),
            RankArena(1 << 20, arena_dtype),
        )
        places = tuple(SitePlacement(site.index, 0, RANK * WIDTH, RANK, 1.0) for site in sites)
        self.slots.publish(self.slots.acquire(), Run(0, 2 * RANK * WIDTH), places)
        self.backend = TritonGroupedLora(arena, self.slots)

    def call(self, num_rows: int, group: int = 0, first: int = 0) -> None:
        """Rows before `first` are the base's."""
        plan = LoraPlan.build(self.slots, [(BASE_SLOT, first), (0, num_rows - first)])
        x, out = (torch.zeros(num_rows, WIDTH, dtype=self.dtype) for _ in range(2))
        grouped_lora(self.backend, x, self.groups[group], plan, {group: out})


def examine(batches: Batches) -> dict[str, Any]:
    """How many kernels there are after a small batch, small ones with other counts, and a large one; its kernels."""
    batches.call(7)
    counts = [num_compiled()]
    for num_rows, group, first in ((1, 1, 0), (16, 16, 0), (5, 17, 4), (3, 2, 1)):  # what Triton could specialise on
        batches.call(num_rows, group, first)
    counts.append(num_compiled())
    batches.call(5000)
    counts.append(num_compiled())
    found = {"shrink": facts(compiled["shrink_kernel"]), "expand": facts(compiled["expand_kernel"])}
    return found | {"num_compiled": counts}


def serve_after_warm_up(batches: Batches) -> dict[str, Any]:
    """How many kernels the warm-up compiled, and how many there are after batches of many sizes."""
    warmed = batches.backend.warm_up(batches.groups, [batches.dtype])
    for num_rows in (1, 15, 16, 17, 64, 100, 256, 1000, 1024, 4096, 5000):
        batches.call(num_rows, num_rows % 18, num_rows // 3)
    return {"warmed": warmed, "num_compiled": num_compiled()}


def main(what: str, capability: int, activations: str, arena: str) -> None:
    triton.runtime.driver.set_active(Device(capability))
    backend_module._launch = compile_only
    batches = Batches(getattr(torch, activations), getattr(torch, arena))
    print(json.dumps(examine(batches) if what == "examine" else serve_after_warm_up(batches)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
