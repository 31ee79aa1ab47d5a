"""Rows of classification and regression: a text or a pair, with its labels or its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.cells import kind_of, label_of, number_of, text_of
from lora_runtime.train.rows.files import Columns, Part, read_cells
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.split import (
    TaskRows,
    check_one_kind,
    hold_out_stratified,
    read_both,
    require_rows,
    sorted_labels,
)
from lora_runtime.types import ProblemType

DEFAULT_PAIR_COLUMN = "text_pair"


@dataclass(frozen=True, slots=True)
class ClassifySchema:
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
    def columns(self) -> Columns:
        if self.text_pair is None:
            return Columns((self.text, self.label), (DEFAULT_PAIR_COLUMN,))
        return Columns((self.text, self.text_pair, self.label))


@dataclass(frozen=True, slots=True)
class ClassifyRow:
    """One row. `labels` holds one name, for multi-label any number; `value` is a regression's target."""

    text: str
    text_pair: str | None
    labels: tuple[str, ...]
    value: float
    place: Place


def read_classify_rows(path: Path, schema: ClassifySchema, part: Part = Part.TRAIN) -> tuple[ClassifyRow, ...]:
    """All rows of a file or folder; raises TrainingDataInvalid at the first that is wrong."""
    cells = read_cells(path, schema.columns, part)
    rows = require_rows(path, (_row(place, values, schema) for place, values in cells))
    # a head is trained on single texts or on pairs, never on a mixture
    check_one_kind(rows, lambda row: row.text_pair is not None, schema.pair_column)
    return rows


def load_classify_rows(
    train: Path, valid: Path | None, schema: ClassifySchema, valid_share: float, seed: int
) -> TaskRows[ClassifyRow]:
    """Read and check both files; without validation rows, hold out `valid_share` of the training rows.

    Labels are sorted, as numbers when all of them are whole numbers. Raises TrainingDataInvalid.
    """
    rows, held_out = read_both(train, valid, lambda path, part: read_classify_rows(path, schema, part))
    labels = _label_set(train, rows, schema)
    if held_out is None:
        rows, held_out = split_classify_rows(rows, valid_share, seed, schema.problem_type)
        if not held_out:
            message = "no label has two rows, so none can be held out; add rows or give a validation file"
            raise TrainingDataInvalid(train, None, message)
    else:
        _check_same_kind(held_out, rows, labels)
    return TaskRows(rows, held_out, labels)


def split_classify_rows(
    rows: Sequence[ClassifyRow], valid_share: float, seed: int, problem_type: ProblemType
) -> tuple[tuple[ClassifyRow, ...], tuple[ClassifyRow, ...]]:
    """Training and validation rows: single-label rows stratified by label, others drawn from as a whole."""
    single = problem_type is ProblemType.SINGLE_LABEL
    return hold_out_stratified(rows, lambda row: row.labels[0] if single else "", valid_share, seed)


def _row(place: Place, cells: Mapping[str, object], schema: ClassifySchema) -> ClassifyRow:
    try:
        pair = cells.get(schema.pair_column)
        target = cells[schema.label]
        regression = schema.problem_type is ProblemType.REGRESSION
        return ClassifyRow(
            text=text_of(schema.text, cells[schema.text]),
            text_pair=None if pair is None else text_of(schema.pair_column, pair),
            labels=() if regression else _labels(target, schema),
            value=number_of(schema.label, target) if regression else 0.0,
            place=place,
        )
    except ValueError as error:
        raise place.invalid(str(error)) from error


def _labels(value: object, schema: ClassifySchema) -> tuple[str, ...]:
    if schema.problem_type is ProblemType.SINGLE_LABEL:
        return (label_of(schema.label, value),)
    if isinstance(value, str):
        parts: list[object] = [part for part in value.split(schema.separator) if part.strip()]
    elif isinstance(value, list):
        parts = list(value)
    else:
        raise ValueError(f"{schema.label} is {kind_of(value)}, not a list or a string")
    names = tuple(label_of(schema.label, part) for part in parts)
    if len(set(names)) != len(names):
        raise ValueError(f"{schema.label} names a label twice")
    return names


def _label_set(path: Path, rows: Sequence[ClassifyRow], schema: ClassifySchema) -> tuple[str, ...]:
    if schema.problem_type is ProblemType.REGRESSION:
        if len({row.value for row in rows}) == 1:
            raise TrainingDataInvalid(path, None, f"every {schema.label} is the same: there is nothing to learn")
        return (schema.label,)  # the head's one row is called as its column is
    names = {name for row in rows for name in row.labels}
    if not names:
        raise TrainingDataInvalid(path, None, "no row names a label")
    if len(names) == 1 and schema.problem_type is ProblemType.SINGLE_LABEL:
        message = f"has only one label, {next(iter(names))!r}; a classifier needs two"
        raise TrainingDataInvalid(path, None, message)
    return sorted_labels(names)


def _check_same_kind(valid: Sequence[ClassifyRow], train: Sequence[ClassifyRow], labels: tuple[str, ...]) -> None:
    known = set(labels)
    for row in valid:
        for name in row.labels:
            if name not in known:
                raise row.place.invalid(f"label {name!r} does not occur in the training file")
    if (valid[0].text_pair is None) != (train[0].text_pair is None):
        raise valid[0].place.invalid("one file holds text pairs, the other single texts; give both the same columns")
