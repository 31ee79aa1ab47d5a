"""Rows of a folder that the library `datasets` saved, of a folder of parquet files, or of one parquet file.

Files are read where they lie: nothing is copied to a cache. Integers of a ClassLabel feature become their names.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from lora_runtime.errors import TrainingDataInvalid, first_line
from lora_runtime.train.rows.place import Place


class Part(StrEnum):
    """What the rows are for; it matters where one folder has both."""

    TRAIN = "train"
    VALID = "validation"


_SPLITS = {"train": Part.TRAIN, "validation": Part.VALID, "valid": Part.VALID, "dev": Part.VALID, "val": Part.VALID}
_NAMED = re.compile(r"(train|validation|valid|val|dev|test)(?:[-_.].*)?", re.IGNORECASE)
_SAVED_DICT, _SAVED = "dataset_dict.json", "state.json"  # what `save_to_disk` writes
_ENCODED = frozenset({"Image", "Audio", "Video", "Pdf"})  # features whose values only further libraries can read


def has_validation(path: Path) -> bool:
    """Whether `path` is a folder that holds validation rows beside its training rows."""
    return path.is_dir() and Part.VALID in {_SPLITS.get(name.lower()) for name in _split_names(path)}


def read_datasets(
    path: Path, part: Part, required: tuple[str, ...], wanted: tuple[str, ...]
) -> Iterator[tuple[Place, Mapping[str, object]]]:
    """Rows of the split for `part`, or of a folder without splits; `wanted` are all columns that a reader looks at."""
    if importlib.util.find_spec("datasets") is None:
        message = "reading it needs the library datasets: pip install 'multilora[datasets]'"
        raise TrainingDataInvalid(path, None, message)
    for home, dataset in _open(path, part):
        columns: list[str] = list(dataset.column_names)
        for name in required:
            if name not in columns:
                raise TrainingDataInvalid(home, None, f"column {name!r} is missing; it has {', '.join(columns)}")
        used = [name for name in columns if name in wanted]
        _check_features(home, dataset, used)
        named = {name: spell for name in used if (spell := _speller(dataset.features[name])) is not None}
        for index, row in enumerate(dataset.select_columns(used)):
            cells = {name: named[name](value) if name in named else value for name, value in row.items()}
            yield Place(home, None, f"row {index + 1}"), cells


def _open(path: Path, part: Part) -> list[tuple[Path, Any]]:
    """The datasets of a part, in the order of their rows, each with the file or folder to name in a message."""
    try:
        return _opened(path, part)
    except (OSError, ValueError, KeyError, TypeError) as error:  # arrow's own errors are of these, too
        raise TrainingDataInvalid(path, None, f"cannot be read as a dataset ({first_line(error)})") from error


def _opened(path: Path, part: Part) -> list[tuple[Path, Any]]:
    from datasets import Dataset, load_from_disk
    from pyarrow import parquet

    if path.is_file():
        return [(path, Dataset(parquet.read_table(path)))]
    if (path / _SAVED).is_file():
        return [(path, load_from_disk(str(path)))]
    names = _split_names(path)
    if (path / _SAVED_DICT).is_file():
        return [(path / name, load_from_disk(str(path / name))) for name in _chosen(path, part, list(names))]
    files = _parquet_files(path)
    if not files:
        message = "is a folder without a dataset: neither one that datasets.save_to_disk wrote nor parquet files"
        raise TrainingDataInvalid(path, None, message)
    if names:
        files = [file for name in _chosen(path, part, list(names)) for file in names[name]]
    return [(file, Dataset(parquet.read_table(file))) for file in files]


def _split_names(path: Path) -> dict[str, list[Path]]:
    """The splits of a folder by name, with their parquet files where those are what it has; empty without splits."""
    if (path / _SAVED_DICT).is_file():
        return {entry.name: [] for entry in sorted(path.iterdir()) if (entry / _SAVED).is_file()}
    found: dict[str, list[Path]] = {}
    without: list[Path] = []
    for file in _parquet_files(path):
        named = _NAMED.fullmatch(file.stem) or (file.parent != path and _NAMED.fullmatch(file.parent.name))
        if named:
            found.setdefault(named[1].lower(), []).append(file)
        else:
            without.append(file)
    if found and without:
        message = f"{without[0].name} names no split, and {next(iter(found.values()))[0].name} does; name all or none"
        raise TrainingDataInvalid(path, None, message)
    return found


def _parquet_files(path: Path) -> list[Path]:
    if (path / _SAVED).is_file():
        return []
    return sorted(file for file in path.rglob("*.parquet") if not file.relative_to(path).as_posix().startswith("."))


def _chosen(path: Path, part: Part, names: Sequence[str]) -> list[str]:
    chosen = [name for name in names if _SPLITS.get(name.lower()) is part]
    if not chosen:
        message = f"has no split called {part}; it has {', '.join(names) or 'none'}: give the path of one of them"
        raise TrainingDataInvalid(path, None, message)
    return chosen


def _check_features(path: Path, dataset: Any, names: Sequence[str]) -> None:
    for name in names:
        if (kind := type(dataset.features[name]).__name__) in _ENCODED:
            raise TrainingDataInvalid(path, None, f"column {name!r} holds {kind.lower()} data, not text")


def _speller(feature: Any) -> Callable[[Any], object] | None:
    """What turns a ClassLabel's integers, alone or in lists, into names; None for other features."""
    if (names := getattr(feature, "names", None)) is not None:
        return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else None
    inner = _speller(feature.feature) if hasattr(feature, "feature") else None
    return None if inner is None else lambda values: None if values is None else [inner(value) for value in values]
