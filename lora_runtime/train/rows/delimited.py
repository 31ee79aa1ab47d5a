"""CSV and TSV: a header line, Excel's quoting, UTF-8. Blank lines are skipped."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.place import Place


def read_delimited(
    path: Path, text: str, required: tuple[str, ...], delimiter: str
) -> Iterator[tuple[Place, Mapping[str, object]]]:
    """The rows of a file's text. Every row has as many fields as the header, which names each column once."""
    records = _records(path, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    line, header = next(records, (1, []))
    _check_header(path, line, header, required)
    for line, cells in records:
        if len(cells) != len(header):
            raise TrainingDataInvalid(path, line, f"has {len(cells)} fields, the header has {len(header)}")
        yield Place(path, line), dict(zip(header, cells, strict=True))


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


def _check_header(path: Path, line: int, header: list[str], required: tuple[str, ...]) -> None:
    columns = ", ".join(header) or "none"
    for name in required:
        if name not in header:
            raise TrainingDataInvalid(path, line, f"column {name!r} is missing; the header names {columns}")
    if len(set(header)) != len(header):
        raise TrainingDataInvalid(path, line, f"the header names a column twice: {columns}")
