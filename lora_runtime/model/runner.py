"""A batch in, a result per row out: packed forward, then heads."""

from __future__ import annotations

from typing import Protocol

import torch

from lora_runtime.arena import SlotTable
from lora_runtime.batch import Batch, Row, Step, current_step
from lora_runtime.kernels.grouped_lora import GroupedLora
from lora_runtime.model.base import BaseModel
from lora_runtime.types import Task


class Runner(Protocol):
    """What the engine needs of a model; `FakeRunner` in the tests is another."""

    def run(self, rows: list[Row]) -> list[torch.Tensor]:
        """Logits [num_labels] per row, on the host; rows of one adapter are adjacent."""
        ...


class PackedRunner:
    """Runs batches on one base; used from the engine thread alone."""

    def __init__(self, base: BaseModel, slots: SlotTable, backend: GroupedLora) -> None:
        self._base = base
        self._slots = slots
        self._backend = backend

    def run(self, rows: list[Row]) -> list[torch.Tensor]:
        """Logits per row; a row without a task gets its hidden states [n, d] instead."""
        with torch.inference_mode():
            step = Step(Batch.pack(rows), self._slots, self._backend)
            hidden = self._forward(step)
            outputs = list(hidden.split(step.batch.lengths))
            for task in dict.fromkeys(row.task for row in rows if row.task is not None):
                self._run_head(task, step, hidden, outputs)
            step.token_plan.check_current()  # no slot changed hands under the batch
            return outputs

    def hidden_states(self, rows: list[Row], *, lora: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the packed rows, in order; `lora=False` runs the same batch on the base alone."""
        if not lora:
            rows = [Row(row.sequence) for row in rows]
        with torch.inference_mode():
            return self._forward(Step(Batch.pack(rows), self._slots, self._backend))

    def _forward(self, step: Step) -> torch.Tensor:
        token = current_step.set(step)
        try:
            return self._base.backbone(step.batch)
        finally:
            current_step.reset(token)

    def _run_head(self, task: Task, step: Step, hidden: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        """Replace the outputs of the task's rows by their logits."""
        chosen = [i for i, row in enumerate(step.batch.rows) if row.task is task]
        if len(chosen) < len(step.batch.rows):
            hidden = torch.cat([outputs[i] for i in chosen])
            step = Step(Batch.pack([step.batch.rows[i] for i in chosen]), self._slots, self._backend)
        for i, logits in zip(chosen, self._base.heads[task].run(step, hidden), strict=True):
            outputs[i] = logits
