"""One served base, with a plain adapter of its own beside whatever a case brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_runtime.batch import Resident, Row
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import Task, TokenSequence
from tests.conformance.cases import Case
from tests.conformance.families import Base
from tests.conformance.matrix_adapters import Adapter, make
from tests.conformance.matrix_sharpness import require_every_kind_matters
from tests.oracle import TaskOracle, relative_difference

TASKS: Mapping[str, Task] = {
    "SEQ_CLS": Task.CLASSIFY,
    "TOKEN_CLS": Task.CLASSIFY_TOKENS,
    "QUESTION_ANS": Task.ANSWER,
    "FEATURE_EXTRACTION": Task.EMBED,
    "CAUSAL_LM": Task.GENERATE,
}
MAX_DIFFERENCE = 1e-4  # of any single value
MAX_RELATIVE = 2e-5  # of the norm over all of an adapter's answers


@dataclass(frozen=True)
class Group:
    """Sequences that one adapter answers, or the base, with what is expected of each."""

    name: str
    sequences: tuple[TokenSequence, ...]
    expected: tuple[torch.Tensor, ...]
    resident: Resident | None = None
    task: Task | None = None

    @property
    def rows(self) -> list[Row]:
        if self.resident is None:
            return [Row(sequence) for sequence in self.sequences]
        return [Row(sequence, self.resident, self.task) for sequence in self.sequences]

    def check(self, outputs: Sequence[torch.Tensor]) -> None:
        """Fail unless the outputs are the ones expected."""
        for i, (found, want) in enumerate(zip(outputs, self.expected, strict=True)):
            assert found.shape == want.shape, f"{self.name}, text {i}: {tuple(found.shape)} is not {tuple(want.shape)}"
            assert torch.isfinite(found).all(), f"{self.name}, text {i}: not finite"
            worst = (found - want).abs().max()
            assert worst < MAX_DIFFERENCE, f"{self.name}, text {i}: differs by {worst:.2e}"
        relative = relative_difference(outputs, self.expected)
        assert relative < MAX_RELATIVE, f"{self.name}: differs by {relative:.2e} of the norm"


class Bench:
    """A base's runtime. Adapters stay loaded until it closes: all share one arena."""

    def __init__(self, base: Base, root: Path) -> None:
        """Serve the base; adapters are saved under `root`. Raises BaseModelUnsupported."""
        self.base = base
        self._root = root
        self.runtime = Runtime(base.folder, RuntimeSettings(arena_bytes=64 << 20))
        self._alone = TaskOracle(self.base.folder, None, "FEATURE_EXTRACTION")
        self._plain: Group | None = None

    def close(self) -> None:
        self.runtime.close()

    def adapter(self, case: Case, seed: int) -> Adapter:
        return make(case, self.base, seed, self._root)

    def group(self, adapter: Adapter) -> Group:
        """An adapter, loaded, and PEFT's answers, to which all that its file holds matters; raises AdapterRejected."""
        sequences = adapter.case.sequences(self.base, adapter.seed)
        name = f"{adapter.case.id}-{adapter.seed}"
        oracle = adapter.oracle()
        group = self.group_of(adapter.folder, name, adapter.case.task, oracle, sequences)
        if not adapter.seed:  # those of another seed are of the same kinds
            require_every_kind_matters(adapter, oracle, sequences, group.expected)
        return group

    def group_of(
        self, folder: Path, name: str, task: str, oracle: TaskOracle, sequences: tuple[TokenSequence, ...]
    ) -> Group:
        """As `group`, of any folder; raises AdapterRejected."""
        adapter = self.runtime.load(folder, name=name).id
        resident = self.runtime.engine.hold([adapter])[adapter]
        expected = tuple(oracle.answer(sequence) for sequence in sequences)
        return Group(name, sequences, expected, resident, TASKS[task])

    def plain(self) -> Group:
        """A plain adapter of a rank that no case has."""
        if self._plain is None:
            task = "FEATURE_EXTRACTION" if self.base.name == "deberta-v2-conv" else "SEQ_CLS"
            self._plain = self.group(self.adapter(Case(self.base.name, "beside", task, ranks=(7, 7)), 0))
        return self._plain

    def alone(self) -> Group:
        """Rows of the base, and what the base answers."""
        sequences = self.base.sequences[:3]
        return Group("base", sequences, tuple(self._alone.hidden_states(sequence) for sequence in sequences))

    def run(self, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
        """Answer all groups in one batch, through the thread that owns the runner."""
        rows = [row for group in groups for row in group.rows]
        outputs = iter(self.runtime.engine.call(lambda: self.runtime.runner.run(rows)))
        return [[next(outputs) for _ in group.rows] for group in groups]
