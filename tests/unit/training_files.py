"""Writes training files, and catches the refusal of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from lora_runtime.errors import TrainingDataInvalid


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with that content."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(folder: Path, name: str, rows: Iterable[object]) -> Path:
    """A file of JSON lines."""
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def refusal(read: Callable[[], object]) -> TrainingDataInvalid:
    """The error that `read` ends in; its message names its file, and its line where it has one."""
    with pytest.raises(TrainingDataInvalid) as caught:
        read()
    error = caught.value
    where = f"{error.path}" if error.line is None else f"{error.path}:{error.line}"
    assert error.message.startswith(f"{where}: ")
    return error
