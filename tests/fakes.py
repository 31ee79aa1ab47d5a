"""Stand-ins that let the engine be tested without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from lora_runtime.adapters.base_spec import BaseSpec, HeadSpec, Leaf, LeafKind
from lora_runtime.adapters.metadata import BaseFingerprint
from lora_runtime.batch import Row
from lora_runtime.kv_blocks import BlockCopy
from lora_runtime.model.launched import Answer
from lora_runtime.types import Site, SiteGroup, Task

WIDTH = 8


def fake_spec() -> BaseSpec:
    """A base of one group of two sites, 8 wide."""
    sites = tuple(Site(i, f"layer.{name}", WIDTH, WIDTH, 0, per_sequence=False) for i, name in enumerate(("q", "v")))
    shapes = {"classifier.weight": (None, WIDTH), "classifier.bias": (None,)}
    head = HeadSpec(Task.CLASSIFY, shapes, frozenset(), frozenset(), output="classifier.weight")
    embed = HeadSpec(Task.EMBED, {}, frozenset(), frozenset(), output="")
    leaves = {site.name: Leaf(site.name, LeafKind.LINEAR, {"weight": (WIDTH, WIDTH)}) for site in sites}
    fingerprint = BaseFingerprint(
        model_type="fake", hidden_size=WIDTH, num_layers=1, vocab_size=10, modules_sha256="0", weights_sha256="0"
    )
    groups = (SiteGroup(0, WIDTH, sites),)
    return BaseSpec(
        name="fake",
        prefixes=("fake",),
        sites=sites,
        groups=groups,
        heads={Task.CLASSIFY: head, Task.EMBED: embed},
        fingerprint=fingerprint,
        max_length=64,
        modules=frozenset({"layer"}),
        leaves=leaves,
    )


class Landed:
    """A batch that was computed when it was launched."""

    def __init__(self, answers: list[torch.Tensor]) -> None:
        self._answers = answers

    def draw(self, alive: Sequence[bool]) -> None:
        assert len(alive) == len(self._answers)

    def answers(self) -> list[Answer]:
        return [*self._answers]


class FakeRunner:
    """Answers each row with its adapter's own bias plus its number of tokens: a wrong adapter shows at once."""

    def __init__(self, seconds_per_batch: float = 0.0) -> None:
        self.batches: list[list[Row]] = []
        self.fail_next: Exception | None = None
        self.cannot_run = 0  # a batch with a sequence of so many tokens fails
        self.scale = 1.0  # of every answer
        self.gate = threading.Event()  # cleared: batches wait
        self.gate.set()
        self._seconds = seconds_per_batch

    def launch(self, rows: list[Row], after: object = None) -> Landed:
        del after  # nothing generates here
        return Landed(self._run(rows))

    def _run(self, rows: list[Row]) -> list[torch.Tensor]:
        self.gate.wait(10)
        time.sleep(self._seconds)
        self.batches.append(rows)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        if any(row.sequence.num_tokens == self.cannot_run for row in rows):
            raise IndexError("index out of range in self")
        return [self.scale * (row.params["classifier.bias"] + row.sequence.num_tokens) for row in rows]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        assert not copies, "nothing generates here"
