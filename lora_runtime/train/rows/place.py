"""Where a row stands in its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a text file, or what a row is called where there are no lines (`row 7`, `question 'q1'`)."""

    path: Path
    line: int | None  # where the row begins, from 1
    name: str = ""  # used where `line` is None

    def invalid(self, message: str) -> TrainingDataInvalid:
        """The error to raise for this row; `message` says what is wrong with it and the remedy."""
        return TrainingDataInvalid(self.path, self.line, f"{self.name}: {message}" if self.name else message)
