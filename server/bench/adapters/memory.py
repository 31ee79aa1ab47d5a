"""What an adapter takes of the arena, and that all of it comes back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.bench.adapters.clients import Client, connect
from server.bench.adapters.figures import at_most, spread
from server.bench.adapters.folders import Template, name_of
from server.bench.adapters.plan import RANK, TARGETS, AdaptersBench
from server.bench.adapters.reference import Reference
from server.bench.adapters.servers import BenchServer
from server.bench.measure import OutputsDiffer

_EVERY_LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
# name → rank and modules; beside the adapters of all parts, which are RANK and TARGETS
SHAPES = {
    "r16-qv": (16, TARGETS),
    "r64-qv": (64, TARGETS),
    "r8-all": (8, _EVERY_LINEAR),
    "r32-all": (32, _EVERY_LINEAR),
}
_CHURN_TIMEOUT_S = 600.0


def write_shapes(base: str, folder: Path, root: Path) -> None:
    """An adapter of each shape below `root`; `folder` is for what is left over."""
    for name, (rank, targets) in SHAPES.items():
        template = Template.make(base, folder / f"template-{name}", rank=rank, targets=targets)
        template.write_folder(root / name, template.write_weights(folder / f"{name}.safetensors", 0))


def measure_memory(
    bench: AdaptersBench,
    reference: Reference,
    server: BenchServer,
    root: Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Bytes by shape on the server, then the churn of one adapter in a runtime of its own."""
    progress("bytes of adapters in the arena")
    found = asyncio.run(_measure_shapes(server))
    found["arena_bytes_after_unloading_all"] = server.arena_used_bytes
    progress(f"{bench.scale.churn_threads} threads load, unload and ask one adapter")
    churn = _churn(bench, reference, root / name_of(0))
    largest = max(shape["arena_bytes_per_parameter_byte"] for shape in found["shapes"].values())
    return found | {
        "churn": churn,
        "targets": {
            "arena bytes ÷ parameter bytes, largest": at_most(largest, 1.05),
            "arena bytes after unloading all": at_most(found["arena_bytes_after_unloading_all"], 0),
            "failed calls of the churn": at_most(churn["failed"], 0),
        },
    }


async def _measure_shapes(server: BenchServer) -> dict[str, Any]:
    shapes: dict[str, Any] = {}
    async with connect(server.target) as client:
        await client.unload_all()
        for name in (name_of(0), *SHAPES):
            shapes[f"r{RANK}-qv" if name not in SHAPES else name] = await _measure_shape(client, server, name)
        await client.unload_all()
    return {"shapes": shapes}


async def _measure_shape(client: Client, server: BenchServer, name: str) -> dict[str, float]:
    before = server.arena_used_bytes
    adapter = await client.load(name)
    taken = server.arena_used_bytes - before
    if taken != adapter.resident_bytes:
        raise OutputsDiffer(f"{name} says it holds {adapter.resident_bytes} bytes, the arena grew by {taken:.0f}")
    parameter_bytes = 4 * adapter.num_parameters
    return {
        "arena_bytes": taken,
        "parameter_bytes": parameter_bytes,
        "arena_bytes_per_parameter_byte": taken / parameter_bytes,
    }


def _churn(bench: AdaptersBench, reference: Reference, folder: Path) -> dict[str, Any]:
    work = {
        "base": bench.base,
        "folder": str(folder),
        "torch_threads": bench.threads,
        "threads": bench.scale.churn_threads,
        "operations": bench.scale.churn_operations,
        "texts": reference.texts,
        "logits": reference.logits[0].tolist(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "server.bench.adapters.churn_process"],
        input=json.dumps(work), capture_output=True, text=True, check=False, timeout=_CHURN_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise OutputsDiffer(f"the churn of one adapter ended with: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["rss_bytes"] = spread(found["rss_bytes"])
    return found
