"""A batch in, a result per row out: forward pass, then heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lora_runtime.arena import SlotTable
from lora_runtime.batch import Batch, Row, Step
from lora_runtime.kernels.grouped_lora import CompilingLora, GroupedLora
from lora_runtime.model.base import BaseModel, like_lengths
from lora_runtime.model.graphs import Eager, GraphedBackbone
from lora_runtime.types import RunnerStats, Task


class Runner(Protocol):
    """What the engine needs of a model; `FakeRunner` in the tests is another."""

    def run(self, rows: list[Row]) -> list[torch.Tensor]:
        """Per row what its task asks for (see TaskHead.run), on the host; rows of one adapter are adjacent."""
        ...


class PackedRunner:
    """Runs batches on one base; used from the engine thread alone."""

    def __init__(self, base: BaseModel, slots: SlotTable, backend: GroupedLora) -> None:
        self._base = base
        self._slots = slots
        self._backend = backend

    def run(self, rows: list[Row]) -> list[torch.Tensor]:
        """The answer of each row; a row without a task gets its hidden states [n, d]."""
        with torch.inference_mode():
            steps: list[Step] = []
            hidden = self._base.backbone.hidden(rows, lambda batch: self._keep(batch, steps))
            outputs = list(hidden.split([row.sequence.num_tokens for row in rows]))
            for task in dict.fromkeys(row.task for row in rows if row.task is not None):
                self._run_head(task, rows, hidden, outputs)
            for step in steps:
                step.tokens.plan.check_current()  # no slot changed hands under the batch
            return _on_host(outputs)

    def warm_up(self) -> None:
        """Compile every kernel that a batch can need, and capture the graphs of the adapters that are READY now."""
        with torch.inference_mode():
            if isinstance(self._backend, CompilingLora):
                self._backend.warm_up(self._slots.groups, (self._base.placement.dtype,))
            if isinstance(self._base.backbone, GraphedBackbone):
                self._base.backbone.capture()

    def stats(self) -> RunnerStats:
        """What it did so far; from any thread."""
        compiled = self._backend.num_compiled if isinstance(self._backend, CompilingLora) else 0
        backbone = self._base.backbone
        if not isinstance(backbone, GraphedBackbone):
            return RunnerStats(compiled)
        graphs = backbone.stats
        eager = {str(reason): graphs.eager[reason] for reason in Eager}
        return RunnerStats(compiled, graphs.captured, graphs.num_bytes, graphs.replayed, eager)

    def hidden_states(self, rows: Sequence[Row], *, lora: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the rows, in order; `lora=False` runs the same batch on the base alone."""
        if not lora:
            rows = [Row(row.sequence) for row in rows]
        with torch.inference_mode():
            return self._base.backbone.hidden(rows, self._make_step)

    def _make_step(self, batch: Batch) -> Step:
        return Step(batch, self._slots, self._backend)

    def _keep(self, batch: Batch, steps: list[Step]) -> Step:
        steps.append(self._make_step(batch))
        return steps[-1]

    def _run_head(self, task: Task, rows: list[Row], hidden: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        """Replace the outputs of the task's rows by their answers."""
        head = self._base.heads[task]
        chosen = [i for i, row in enumerate(rows) if row.task is task]
        batches = like_lengths([rows[i] for i in chosen]) if head.pads else [list(range(len(chosen)))]
        for batch in batches:
            members = [chosen[place] for place in batch]
            everything = members == list(range(len(rows)))
            states = hidden if everything else torch.cat([outputs[i] for i in members])
            step = self._make_step(Batch.pack([rows[i] for i in members], self._base.placement.device))
            for i, answer in zip(members, head.run(step, states), strict=True):
                outputs[i] = answer


def _on_host(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same in fp32 on the host, by one copy."""
    if all(output.device.type == "cpu" for output in outputs):
        return [output.float() for output in outputs]
    together = torch.cat([output.reshape(-1).float() for output in outputs]).cpu()
    parts = together.split([output.numel() for output in outputs])
    return [part.view(output.shape) for part, output in zip(parts, outputs, strict=True)]
