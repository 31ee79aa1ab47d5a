"""Rows of a training file: read, checked, and refused with the file and the line.

CSV and TSV have a header line and Excel's quoting; JSONL has one object a line. All are UTF-8, a byte order
mark allowed; blank lines are skipped.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.types import ProblemType

DEFAULT_PAIR_COLUMN = "text_pair"


@dataclass(frozen=True, slots=True)
class RowSchema:
    """How the rows of a file are read.

    `text_pair` None takes the column `text_pair` when there is one; a name makes that column required.
    `separator` joins the names of a multi-label row; such a row may name no label at all.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    problem_type: ProblemType = ProblemType.SINGLE_LABEL
    separator: str = "|"

    @property
    def pair_column(self) -> str:
        return self.text_pair or DEFAULT_PAIR_COLUMN

    @property
    def required(self) -> tuple[str, ...]:
        return (self.text, self.label) if self.text_pair is None else (self.text, self.text_pair, self.label)


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `labels` holds one name, for multi-label any number; `value` is a regression's target."""

    text: str
    text_pair: str | None
    labels: tuple[str, ...]
    value: float
    line: int  # where the row begins, from 1


_Row = tuple[int, Mapping[str, object]]


def read_examples(path: Path, schema: RowSchema) -> tuple[Example, ...]:
    """All rows of a .csv, .tsv or .jsonl file; raises TrainingDataInvalid at the first that is wrong."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TrainingDataInvalid(path, None, f"the ending must be one of {', '.join(sorted(_READERS))}")
    rows = reader(path, _decode(path), schema)
    examples = tuple(_example(path, line, cells, schema) for line, cells in rows)
    if not examples:
        raise TrainingDataInvalid(path, None, "has no rows")
    _check_pairs_agree(path, examples, schema)
    return examples


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingDataInvalid(path, None, f"cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{data[error.start]:02x} is not valid UTF-8; save the file as UTF-8"
        raise TrainingDataInvalid(path, line, message) from error


def _read_delimited(path: Path, text: str, schema: RowSchema, delimiter: str) -> Iterator[_Row]:
    records = _records(path, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    line, header = next(records, (1, []))
    _check_header(path, line, header, schema)
    for line, cells in records:
        if len(cells) != len(header):
            raise TrainingDataInvalid(path, line, f"has {len(cells)} fields, the header has {len(header)}")
        yield line, dict(zip(header, cells, strict=True))


def _records(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, with the line on which each begins: a quoted field may span several."""
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise TrainingDataInvalid(path, line, f"is not valid CSV ({error}); is a quote left open?") from error
        if cells:
            yield line, cells
        line = getattr(reader, "line_num", line) + 1


def _check_header(path: Path, line: int, header: list[str], schema: RowSchema) -> None:
    columns = ", ".join(header) or "none"
    for name in schema.required:
        if name not in header:
            raise TrainingDataInvalid(path, line, f"column {name!r} is missing; the header names {columns}")
    if len(set(header)) != len(header):
        raise TrainingDataInvalid(path, line, f"the header names a column twice: {columns}")


def _read_jsonl(path: Path, text: str, schema: RowSchema) -> Iterator[_Row]:
    # split at "\n" only: splitlines() would also cut at U+2028, which JSON strings may hold
    for line, source in enumerate(text.split("\n"), start=1):
        if not source.strip():
            continue
        try:
            row = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise TrainingDataInvalid(path, line, f"is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise TrainingDataInvalid(path, line, f"holds a JSON {type(row).__name__}, not an object")
        for name in schema.required:
            if name not in row:
                raise TrainingDataInvalid(path, line, f"field {name!r} is missing; the row has {', '.join(row)}")
        yield line, row


def _read_csv(path: Path, text: str, schema: RowSchema) -> Iterator[_Row]:
    return _read_delimited(path, text, schema, ",")


def _read_tsv(path: Path, text: str, schema: RowSchema) -> Iterator[_Row]:
    return _read_delimited(path, text, schema, "\t")


_READERS: Mapping[str, Callable[[Path, str, RowSchema], Iterator[_Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
}


def _example(path: Path, line: int, cells: Mapping[str, object], schema: RowSchema) -> Example:
    try:
        pair = cells.get(schema.pair_column)
        target = cells[schema.label]
        regression = schema.problem_type is ProblemType.REGRESSION
        return Example(
            text=_text(schema.text, cells[schema.text]),
            text_pair=None if pair is None else _text(schema.pair_column, pair),
            labels=() if regression else _labels(target, schema),
            value=_number(schema.label, target) if regression else 0.0,
            line=line,
        )
    except ValueError as error:
        raise TrainingDataInvalid(path, line, str(error)) from error


def _text(column: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is {_kind(value)}, not a string")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    _check_encodable(column, value)
    return value


def _check_encodable(column: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, tokenizers cannot read it
        raise ValueError(f"{column} holds half of a surrogate pair at character {error.start + 1}") from error


def _labels(value: object, schema: RowSchema) -> tuple[str, ...]:
    if schema.problem_type is ProblemType.SINGLE_LABEL:
        return (_label_name(schema.label, value),)
    if isinstance(value, str):
        parts: list[object] = [part for part in value.split(schema.separator) if part.strip()]
    elif isinstance(value, list):
        parts = list(value)
    else:
        raise ValueError(f"{schema.label} is {_kind(value)}, not a list or a string")
    names = tuple(_label_name(schema.label, part) for part in parts)
    if len(set(names)) != len(names):
        raise ValueError(f"{schema.label} names a label twice")
    return names


def _label_name(column: str, value: object) -> str:
    """A label's name: a string, trimmed, or a whole number in JSON, as its digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{column} is {_kind(value)}, not a string or a whole number")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    _check_encodable(column, value)
    return value.strip()


def _number(column: str, value: object) -> float:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{column} is empty")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{column} is {_kind(value)}, not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{column} is {str(value)[:40]!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{column} is {number}, not a finite number")
    return number


def _kind(value: object) -> str:
    names = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "bool": "a boolean",
        "str": "a string",
    }
    return names.get(type(value).__name__, "a number")


def _check_pairs_agree(path: Path, examples: tuple[Example, ...], schema: RowSchema) -> None:
    """A head is trained on single texts or on pairs, never on a mixture."""
    pairs = examples[0].text_pair is not None
    for example in examples:
        if (example.text_pair is not None) != pairs:
            verb = "lacks" if pairs else "has"
            message = f"{verb} {schema.pair_column}, other than the rows before it"
            raise TrainingDataInvalid(path, example.line, message)
