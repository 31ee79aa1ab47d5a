"""Rows of generation and translation: the fields of a prompt, and what is to be written after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_runtime.train.rows.cells import text_of
from lora_runtime.train.rows.files import Columns, Part, read_cells
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.split import TaskRows, grouped_rows, read_both, require_rows


@dataclass(frozen=True, slots=True)
class PromptSchema:
    """`fields` maps each field of the prompt's template to its column; `completion` is the column of the answer."""

    fields: Mapping[str, str] = field(default_factory=lambda: {"prompt": "prompt"})
    completion: str = "completion"

    @property
    def columns(self) -> Columns:
        return Columns(tuple(dict.fromkeys((*self.fields.values(), self.completion))))


def translate_schema(source: str = "source", target: str = "target") -> PromptSchema:
    """Two columns of sentences; the source becomes the field `text`, which the RPC Translate fills."""
    return PromptSchema({"text": source}, target)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt, as the fields of its template, and its completion."""

    fields: Mapping[str, str]
    completion: str
    place: Place


def read_prompt_rows(path: Path, schema: PromptSchema, part: Part = Part.TRAIN) -> tuple[PromptRow, ...]:
    """All rows of a file or folder; raises TrainingDataInvalid at the first that is wrong."""
    cells = read_cells(path, schema.columns, part)
    return require_rows(path, (_row(place, values, schema) for place, values in cells))


def load_prompt_rows(
    train: Path, valid: Path | None, schema: PromptSchema, valid_share: float, seed: int
) -> TaskRows[PromptRow]:
    """Read both files; without validation rows, hold out rows, those of equal fields on one side."""
    rows, given = read_both(train, valid, lambda path, part: read_prompt_rows(path, schema, part))
    kept, held_out = grouped_rows(
        train, rows, given, lambda row: tuple(sorted(row.fields.items())), "prompt", valid_share, seed
    )
    return TaskRows(kept, held_out)


def _row(place: Place, cells: Mapping[str, object], schema: PromptSchema) -> PromptRow:
    try:
        fields = {name: text_of(column, cells[column]) for name, column in schema.fields.items()}
        return PromptRow(fields, text_of(schema.completion, cells[schema.completion]), place)
    except ValueError as error:
        raise place.invalid(str(error)) from error
