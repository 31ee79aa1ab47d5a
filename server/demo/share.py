"""What mixing costs: batches of several adapters against the same texts on the base alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

from lora_runtime.arena import BASE_SLOT
from lora_runtime.batch import Row
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import Task
from server.bench.measure import OutputsDiffer, Spread, interleave, largest_difference, ratio
from server.bench.packed import run_packed

ROUNDS = 7
TOLERANCE = 1e-4  # absolute, on logits in fp32


def measure_base_share(base: str, work: list[tuple[Path, list[str]]], threads: int) -> Spread:
    """Throughput of mixed batches over that of the same texts with LoRA off and one head; `work` is (folder, texts).

    Raises OutputsDiffer when a text's logits in a mixed batch are not those it has alone.
    """
    settings = RuntimeSettings(num_threads=threads)
    with Runtime(base, settings) as runtime:
        of_adapter: list[list[Row]] = []
        for folder, texts in work:
            adapter = runtime.load(folder).id
            resident = runtime.engine.hold([adapter])[adapter]
            pairs = [(text, None) for text in texts]
            sequences = runtime.encoder.encode(pairs, max_length=resident.card.max_length, truncate=True)
            of_adapter.append([Row(s, resident, Task.CLASSIFY) for s in sequences])
        # in turn, as texts of different tenants arrive
        mixed = [row for row in chain.from_iterable(zip_longest(*of_adapter)) if row is not None]
        return runtime.engine.call(lambda: _compare(runtime, mixed, settings.token_budget))


def _compare(runtime: Runtime, mixed: list[Row], token_budget: int) -> Spread:
    no_lora = replace(mixed[0].resident, slot=BASE_SLOT)
    plain = [Row(row.sequence, no_lora, Task.CLASSIFY) for row in mixed]
    alone = [runtime.runner.answers([row])[0] for row in mixed]
    error = largest_difference(run_packed(runtime, mixed, token_budget), alone)
    if not error <= TOLERANCE:
        raise OutputsDiffer(f"a mixed batch differs from the same texts alone by {error:.1e}")
    turns: dict[str, Callable[[], object]] = {
        "mixed": lambda: run_packed(runtime, mixed, token_budget),
        "base": lambda: run_packed(runtime, plain, token_budget),
    }
    return ratio(interleave(turns, ROUNDS, lambda _: None), "mixed", "base")
