"""Cells of the rows of any kind of file, with the place of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.datasets_folder import Part, has_validation, read_datasets
from lora_runtime.train.rows.delimited import read_delimited
from lora_runtime.train.rows.json_files import read_json_array, read_json_lines
from lora_runtime.train.rows.place import Place

__all__ = ["Cells", "Columns", "Part", "decode", "has_validation", "read_cells"]

Cells = tuple[Place, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a reader looks at. A file without one of `required` is refused with those it has."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def read_cells(
    path: Path, columns: Columns, part: Part = Part.TRAIN, more_endings: tuple[str, ...] = ()
) -> Iterator[Cells]:
    """Place and cells of every row of a .csv, .tsv, .jsonl, .ndjson, .json or .parquet file, or a dataset's folder.

    Text is UTF-8, a byte order mark allowed. `more_endings` are those that the caller reads itself, for the message.
    Raises TrainingDataInvalid at the first row that is wrong.
    """
    ending = path.suffix.lower()
    if path.is_dir() or (ending == ".parquet" and path.exists()):
        return read_datasets(path, part, columns.required, columns.required + columns.optional)
    reader = _READERS.get(ending)
    if reader is None and path.exists():
        endings = ", ".join(sorted({*_READERS, ".parquet", *more_endings}))
        raise TrainingDataInvalid(path, None, f"the ending must be one of {endings}, or the path a dataset's folder")
    text = decode(path)
    assert reader is not None  # what does not exist was refused by decode
    return reader(path, text, columns.required)


def decode(path: Path) -> str:
    """A file's text. Raises TrainingDataInvalid with the line of the first byte that is not UTF-8."""
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


def _read_csv(path: Path, text: str, required: tuple[str, ...]) -> Iterator[Cells]:
    return read_delimited(path, text, required, ",")


def _read_tsv(path: Path, text: str, required: tuple[str, ...]) -> Iterator[Cells]:
    return read_delimited(path, text, required, "\t")


_READERS: Mapping[str, Callable[[Path, str, tuple[str, ...]], Iterator[Cells]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_array,
}
