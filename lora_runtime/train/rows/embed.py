"""Rows of embedding: a text and one that is close to it, with one that is not, or with how close they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.cells import number_of, text_of
from lora_runtime.train.rows.files import Columns, Part, read_cells
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.split import TaskRows, check_one_kind, grouped_rows, read_both, require_rows

DEFAULT_NEGATIVE, DEFAULT_SCORE = "negative", "score"


@dataclass(frozen=True, slots=True)
class EmbedSchema:
    """`negative` and `score` None take columns of those names when there are; a name makes that column required."""

    text: str = "text"
    positive: str = "positive"
    negative: str | None = None
    score: str | None = None

    @property
    def negative_column(self) -> str:
        return self.negative or DEFAULT_NEGATIVE

    @property
    def score_column(self) -> str:
        return self.score or DEFAULT_SCORE

    @property
    def columns(self) -> Columns:
        asked = tuple(name for name in (self.negative, self.score) if name is not None)
        return Columns((self.text, self.positive, *asked), (self.negative_column, self.score_column))


@dataclass(frozen=True, slots=True)
class EmbedRow:
    """A pair, a triplet (`negative`), or a scored pair (`score` from 0 to 1), the same kind in all rows of a run."""

    text: str
    positive: str
    negative: str | None
    score: float | None
    place: Place


def read_embed_rows(path: Path, schema: EmbedSchema, part: Part = Part.TRAIN) -> tuple[EmbedRow, ...]:
    """All rows of a file or folder; raises TrainingDataInvalid at the first that is wrong."""
    cells = read_cells(path, schema.columns, part)
    rows = require_rows(path, (_row(place, values, schema) for place, values in cells))
    check_one_kind(rows, lambda row: row.negative is not None, schema.negative_column)
    check_one_kind(rows, lambda row: row.score is not None, schema.score_column)
    return rows


def load_embed_rows(
    train: Path, valid: Path | None, schema: EmbedSchema, valid_share: float, seed: int
) -> TaskRows[EmbedRow]:
    """Read both files; without validation rows, hold out rows, those of one `text` on one side."""
    rows, given = read_both(train, valid, lambda path, part: read_embed_rows(path, schema, part))
    if rows[0].score is not None and len({row.score for row in rows}) == 1:
        message = f"every {schema.score_column} is the same: there is nothing to learn"
        raise TrainingDataInvalid(train, None, message)
    if given is not None:
        _check_same_kind(given, rows)
    kept, held_out = grouped_rows(train, rows, given, lambda row: row.text, "text", valid_share, seed)
    return TaskRows(kept, held_out)


def _row(place: Place, cells: Mapping[str, object], schema: EmbedSchema) -> EmbedRow:
    negative, score = cells.get(schema.negative_column), cells.get(schema.score_column)
    try:
        if negative is not None and score is not None:
            names = f"{schema.negative_column} and {schema.score_column}"
            raise ValueError(f"has both {names}; keep one: triplets have the first, scored pairs the second")
        return EmbedRow(
            text=text_of(schema.text, cells[schema.text]),
            positive=text_of(schema.positive, cells[schema.positive]),
            negative=None if negative is None else text_of(schema.negative_column, negative),
            score=None if score is None else _share(schema.score_column, score),
            place=place,
        )
    except ValueError as error:
        raise place.invalid(str(error)) from error


def _share(column: str, value: object) -> float:
    number = number_of(column, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{column} is {number}, not within 0 and 1; divide all by the highest possible score")
    return number


def _check_same_kind(valid: Sequence[EmbedRow], train: Sequence[EmbedRow]) -> None:
    kinds = [(rows[0].negative is None, rows[0].score is None) for rows in (train, valid)]
    if kinds[0] != kinds[1]:
        message = "the files hold different kinds of rows (pairs, triplets, scored pairs); give both the same columns"
        raise valid[0].place.invalid(message)
