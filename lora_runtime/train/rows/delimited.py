"""CSV and TSV: a header line, Excel's quoting, UTF-8. Blank lines are skipped.

A TSV file may also be plain: quotes are letters, as in `"Hello," he said.`, and every line is a row.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.place import Place

_LINE_ENDS = re.compile("\r\n|\r|\n")
_QUOTED = re.compile('"(?:[^"]|"")*"')


def read_delimited(
    path: Path, text: str, required: tuple[str, ...], delimiter: str
) -> Iterator[tuple[Place, Mapping[str, object]]]:
    """The rows of a file's text. Every row has as many fields as the header, which names each column once."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" and _quotes_are_letters(text) else csv.QUOTE_MINIMAL
    stream = io.StringIO(text, newline="")
    records = _records(path, csv.reader(stream, delimiter=delimiter, strict=True, quoting=quoting))
    line, header = next(records, (1, []))
    _check_header(path, line, header, required)
    for line, cells in records:
        if len(cells) != len(header):
            raise TrainingDataInvalid(path, line, f"has {len(cells)} fields, the header has {len(header)}")
        yield Place(path, line), dict(zip(header, cells, strict=True))


def _quotes_are_letters(text: str) -> bool:
    """Whether a field begins with a quote that Excel's quoting does not allow, and each line alone has all fields."""
    lines = [line.split("\t") for line in _LINE_ENDS.split(text) if line]
    if not all(len(fields) == len(lines[0]) for fields in lines):
        return False
    return any(field.startswith('"') and not _QUOTED.fullmatch(field) for fields in lines for field in fields)


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
