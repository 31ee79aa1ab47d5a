"""A batch in, a result per row out: forward pass, then heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from lora_runtime.arena import SlotTable
from lora_runtime.batch import Batch, Row, Step
from lora_runtime.heads import TaskHead
from lora_runtime.kernels.grouped_lora import CompilingLora, GroupedLora
from lora_runtime.kv_blocks import BlockCopy
from lora_runtime.model.base import BaseModel, like_lengths
from lora_runtime.model.graphs import Eager, GraphedBackbone
from lora_runtime.model.launched import Answer, LaunchedBatch
from lora_runtime.model.paged import PagedLayers
from lora_runtime.model.placement import device_memory
from lora_runtime.types import RunnerStats, Task, TokenSequence


class Launched(Protocol):
    """A batch that was launched."""

    def draw(self, alive: Sequence[bool]) -> None:
        """Draw the tokens of the rows that go on and are alive; once, before `answers`."""
        ...

    def answers(self) -> list[Answer]:
        """Wait for them; those of rows that were not alive are undefined."""
        ...


class Runner(Protocol):
    """What the engine needs of a model; `FakeRunner` in the tests is another."""

    def launch(self, rows: list[Row], after: Any = None) -> Launched:
        """Start a batch; rows of one adapter are adjacent.

        Per row its answer is what its task asks for (see TaskHead.run), on the host; of a row that continues a
        sequence a token for each of its `states`. `after`: what was launched before, and has drawn, where rows take
        tokens that it drew.
        """
        ...

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks of the KV cache, before a step writes to any."""
        ...


class PackedRunner:
    """Runs batches on one base; used from the engine thread alone."""

    def __init__(
        self, base: BaseModel, slots: SlotTable, backend: GroupedLora, paged: PagedLayers | None = None
    ) -> None:
        """Without `paged` no row continues a sequence."""
        self._base = base
        self._slots = slots
        self._backend = backend
        self._paged = paged

    def launch(self, rows: list[Row], after: LaunchedBatch | None = None) -> LaunchedBatch:
        """See Runner. A row without a task answers with its hidden states [n, d]."""
        with torch.inference_mode():
            steps: list[Step] = []
            hidden = self._base.backbone.hidden(rows, lambda batch: self._keep(batch, steps, after))
            outputs = list(hidden.split([row.sequence.num_tokens for row in rows]))
            plain = [i for i, row in enumerate(rows) if row.cached is None]
            for task in dict.fromkeys(rows[i].task for i in plain):
                if task is not None:
                    self._run_head(task, [i for i in plain if rows[i].task is task], rows, hidden, outputs)
            return LaunchedBatch(rows, outputs, steps, self._next_logits)

    def run(self, rows: list[Row]) -> list[Answer]:
        """The answers of a batch by itself."""
        launched = self.launch(rows)
        launched.draw([True] * len(rows))
        return launched.answers()

    def answers(self, rows: list[Row]) -> list[torch.Tensor]:
        """As `run`, of rows of which none continues a sequence."""
        return [answer for answer in self.run(rows) if isinstance(answer, torch.Tensor)]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """See Runner."""
        if copies:
            assert self._paged is not None, "blocks are those of a KV cache"
            with torch.inference_mode():
                self._paged.copy(copies)

    def warm_up(self) -> None:
        """Compile every kernel that a batch can need, and capture the graphs of the adapters that are READY now."""
        with torch.inference_mode():
            if isinstance(self._backend, CompilingLora):
                self._backend.warm_up(self._slots.groups, (self._base.placement.dtype,))
            backbone = self._base.backbone
            eager = backbone.packed if isinstance(backbone, GraphedBackbone) else backbone
            for row in () if self._paged is None else self._paged.warm_up_rows(self._base.spec.max_length):
                eager.hidden([row], self._make_step)
            if isinstance(backbone, GraphedBackbone):
                backbone.capture()

    def stats(self) -> RunnerStats:
        """What it did so far; from any thread."""
        compiled = self._backend.num_compiled if isinstance(self._backend, CompilingLora) else 0
        backbone, memory = self._base.backbone, device_memory(self._base.placement.device)
        if not isinstance(backbone, GraphedBackbone):
            return RunnerStats(compiled, device_memory=memory)
        graphs = backbone.stats
        eager = {str(reason): graphs.eager[reason] for reason in Eager}
        return RunnerStats(compiled, graphs.captured, graphs.num_bytes, graphs.replayed, eager, memory)

    def hidden_states(self, rows: Sequence[Row], *, lora: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the rows, in order; `lora=False` runs the same batch on the base alone."""
        if not lora:
            rows = [Row(row.sequence) for row in rows]
        with torch.inference_mode():
            return self._base.backbone.hidden(rows, self._make_step)

    def _make_step(self, batch: Batch) -> Step:
        step = Step(batch, self._slots, self._backend)
        if batch.num_cached_rows:
            assert self._paged is not None, "rows continue over a KV cache"
            step.paged = self._paged.step(batch.rows)
        return step

    def _keep(self, batch: Batch, steps: list[Step], after: LaunchedBatch | None) -> Step:
        steps.append(self._make_step(batch))
        if after is not None:
            after.feed(batch)
        return steps[-1]

    def _next_logits(self, rows: Sequence[Row], last: torch.Tensor, step: Step | None) -> torch.Tensor:
        """[n, vocabulary] after each row, from the hidden states [n, d] of their last tokens."""
        if step is None:
            batch = Batch.pack([_last_token(row) for row in rows], self._base.placement.device)
            step = Step(batch, self._slots, self._backend)
        head = self._base.heads[Task.GENERATE]
        assert isinstance(head, TaskHead)
        return head.next_token(step, last)

    def _run_head(
        self, task: Task, chosen: list[int], rows: list[Row], hidden: torch.Tensor, outputs: list[torch.Tensor]
    ) -> None:
        """Replace the outputs of the chosen rows, all those of the task, by their answers."""
        head = self._base.heads[task]
        batches = like_lengths([rows[i] for i in chosen]) if head.pads else [list(range(len(chosen)))]
        for batch in batches:
            members = [chosen[place] for place in batch]
            everything = members == list(range(len(rows)))
            states = hidden if everything else torch.cat([outputs[i] for i in members])
            step = Step(Batch.pack([rows[i] for i in members], self._base.placement.device), self._slots, self._backend)
            for i, answer in zip(members, head.run(step, states), strict=True):
                outputs[i] = answer


def _last_token(row: Row) -> Row:
    """The row's last token alone, where the sequence goes on."""
    assert row.cached is not None
    if row.sequence.num_tokens == 1:
        return row
    start = row.cached.start + row.sequence.num_tokens - 1
    last = TokenSequence(row.sequence.input_ids[-1:], None)
    return replace(row, sequence=last, cached=replace(row.cached, start=start))
