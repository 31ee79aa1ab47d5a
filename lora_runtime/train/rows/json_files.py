"""JSON lines, one object a line, and JSON files that are an array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.place import Place

Cells = tuple[Place, Mapping[str, object]]
_BLANK = " \t\r\n"


def read_json_lines(path: Path, text: str, required: tuple[str, ...]) -> Iterator[Cells]:
    """One object a line; blank lines are skipped."""
    # split at "\n" only: splitlines() would also cut at U+2028, which JSON strings may hold
    for line, source in enumerate(text.split("\n"), start=1):
        if not source.strip():
            continue
        try:
            row = _DECODER.decode(source)
        except (ValueError, RecursionError) as error:
            raise TrainingDataInvalid(path, line, f"is not valid JSON ({error})") from error
        yield _cells(Place(path, line), row, required)


def read_json_array(path: Path, text: str, required: tuple[str, ...]) -> Iterator[Cells]:
    """The objects of one array, each with the line on which it begins."""
    at = _skip_blank(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        what = "if it has one object a line, let its name end in .jsonl"
        raise TrainingDataInvalid(path, None, f"is not a JSON array of objects; {what}")
    line, counted = 1, 0
    at = _skip_blank(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        row, at = _decode(path, text, at)
        yield _cells(Place(path, line), row, required)
        at = _skip_blank(text, at)
        if more := text[at : at + 1] == ",":
            at = _skip_blank(text, at + 1)
    if text[at : at + 1] != "]":
        raise TrainingDataInvalid(path, _line(text, at), "is not valid JSON (a comma or ] is missing)")
    _check_end(path, text, at + 1)


def read_json(path: Path, text: str) -> Any:
    """The one JSON value of a file."""
    value, end = _decode(path, text, _skip_blank(text, 0))
    _check_end(path, text, end)
    return value


def _decode(path: Path, text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise TrainingDataInvalid(path, error.lineno, f"is not valid JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        raise TrainingDataInvalid(path, _line(text, at), f"is not valid JSON ({error})") from error


def _check_end(path: Path, text: str, at: int) -> None:
    at = _skip_blank(text, at)
    if at != len(text):
        what = "is not valid JSON (more follows its end); if it has one object a line, let its name end in .jsonl"
        raise TrainingDataInvalid(path, _line(text, at), what)


def _skip_blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANK:
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _cells(place: Place, row: object, required: tuple[str, ...]) -> Cells:
    if not isinstance(row, dict):
        raise place.invalid(f"holds a JSON {type(row).__name__}, not an object")
    cells: dict[str, object] = row
    for name in required:
        if name not in cells:
            raise place.invalid(f"field {name!r} is missing; the row has {', '.join(cells) or 'none'}")
    return place, cells


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names {twice[:64]!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
