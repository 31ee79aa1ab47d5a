"""A batch that was launched: its tokens are drawn later, and its answers waited for later still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from lora_runtime.batch import Batch, Row, Step
from lora_runtime.sampling.drawn import Drawn
from lora_runtime.sampling.row import RowState
from lora_runtime.sampling.sampler import Sampler
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.sampling.transfer import ToHost, on_device

Answer = torch.Tensor | list[SampledToken]
# of the last tokens of rows, from hidden states; the step that those tokens were in, if it had no others
NextLogits = Callable[[Sequence[Row], torch.Tensor, Step | None], torch.Tensor]


class LaunchedBatch:
    """What the runner started. Used from the engine thread alone, in the order `draw`, `answers`."""

    def __init__(
        self, rows: Sequence[Row], outputs: list[torch.Tensor], steps: list[Step], next_logits: NextLogits
    ) -> None:
        """`outputs`: of a row that continues its hidden states [n, d], of another its answer."""
        self._rows = rows
        self._outputs = outputs
        self._plain = [i for i, row in enumerate(rows) if row.cached is None]
        self._whole = _Answers([outputs[i] for i in self._plain])
        self._steps = steps
        self._next_logits = next_logits
        self._counts: dict[int, int] = {}  # tokens that each row draws, by its place
        self._states: list[RowState] = []
        self._drawn: Drawn | None = None

    def draw(self, alive: Sequence[bool]) -> None:
        """Draw a token for each state of the rows that go on and are alive; the others draw nothing."""
        rows = [
            (i, row, row.cached.states)
            for i, row in enumerate(self._rows)
            if row.cached is not None and row.cached.states and alive[i]
        ]
        if not rows:
            return
        with torch.inference_mode():
            last = torch.stack([self._outputs[i][-1] for i, _, _ in rows])
            every = len(rows) == len(self._rows) == sum(row.sequence.num_tokens for row in self._rows)
            step = self._steps[0] if every and len(self._steps) == 1 else None
            logits = self._next_logits([row for _, row, _ in rows], last, step).float()  # [n, vocabulary]
            repeats = [len(states) for _, _, states in rows]
            if max(repeats) > 1:
                logits = logits.repeat_interleave(on_device(repeats, logits.device), 0, output_size=sum(repeats))
            self._states = [state for _, _, states in rows for state in states]
            self._counts = {i: len(states) for i, _, states in rows}
            self._drawn = Sampler().draw(logits, self._states)

    def answers(self) -> list[Answer]:
        """Wait for them: per row what its task asks for, on the host, or its tokens."""
        tokens = [] if self._drawn is None else self._drawn.results()
        ends = dict(zip(self._counts, accumulate(self._counts.values()), strict=True))
        whole = dict(zip(self._plain, self._whole.wait(), strict=True))
        for step in self._steps:
            step.tokens.plan.check_current()  # no slot changed hands under the batch
        found: list[Answer] = []
        for i in range(len(self._rows)):
            end = ends.get(i, 0)
            found.append(whole[i] if i in whole else tokens[end - self._counts.get(i, 0) : end])
        return found

    def feed(self, batch: Batch) -> None:
        """Put tokens that were drawn here where rows of the next batch have them as theirs."""
        starts = accumulate(batch.lengths, initial=0)
        wanted = [
            (start, row.cached.after)
            for start, row in zip(starts, batch.rows, strict=False)
            if row.cached is not None and row.cached.after is not None
        ]
        if not wanted:
            return
        assert self._drawn is not None
        places = {id(state): place for place, state in enumerate(self._states)}
        targets, sources = [start for start, _ in wanted], [places[id(state)] for _, state in wanted]
        ids, tokens, count = batch.input_ids, self._drawn.tokens.clamp(min=0), len(wanted)  # -1: the request fails
        if targets == sources == list(range(count)):  # the same texts as before, in the same order
            ids[:count].copy_(tokens[:count])
        else:
            ids.index_copy_(0, on_device(targets, ids.device), tokens[on_device(sources, ids.device)])


class _Answers:
    """The answers of rows that are done, in fp32, on their way to the host by one copy."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self._outputs = outputs
        self._together: ToHost | None = None
        if any(output.is_cuda for output in outputs):
            with torch.inference_mode():
                self._together = ToHost([torch.cat([output.reshape(-1).float() for output in outputs])])

    def wait(self) -> list[torch.Tensor]:
        if self._together is None:
            return [output.float() for output in self._outputs]
        (together,) = self._together.wait()
        parts = together.split([output.numel() for output in self._outputs])
        return [part.view(output.shape) for part, output in zip(parts, self._outputs, strict=True)]
