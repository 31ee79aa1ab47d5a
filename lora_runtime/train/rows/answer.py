"""Rows of extractive question answering: a question, its context, and where the answers stand in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.cells import kind_of, list_of, text_of, whole_number_of
from lora_runtime.train.rows.files import Cells, Columns, Part, decode, read_cells
from lora_runtime.train.rows.json_files import read_json
from lora_runtime.train.rows.locate import locate
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.split import TaskRows, grouped_rows, read_both, require_rows
from lora_runtime.train.rows.squad import is_squad, read_squad


@dataclass(frozen=True, slots=True)
class AnswerSchema:
    """Columns of files that are not SQuAD's JSON.

    `answers` holds SQuAD's objects, or one of the lists `text` and `answer_start`; where a row has no such column,
    `answer` holds one text and `answer_start` its character, which may be left out where the text occurs once.
    """

    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    answer: str = "answer"
    answer_start: str = "answer_start"
    id: str = "id"

    @property
    def columns(self) -> Columns:
        return Columns((self.question, self.context), (self.answers, self.answer, self.answer_start, self.id))


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One question. `answers` are (start, text), so that `context.startswith(text, start)`; () without an answer."""

    question: str
    context: str
    answers: tuple[tuple[int, str], ...]
    id: str  # as in the file, else its number from 1
    place: Place


def read_answer_rows(path: Path, schema: AnswerSchema, part: Part = Part.TRAIN) -> tuple[AnswerRow, ...]:
    """All questions of a file or folder; raises TrainingDataInvalid at the first that is wrong."""
    cells = _cells(path, schema, part)
    return require_rows(path, (_row(index, *row, schema) for index, row in enumerate(cells, start=1)))


def load_answer_rows(
    train: Path, valid: Path | None, schema: AnswerSchema, valid_share: float, seed: int
) -> TaskRows[AnswerRow]:
    """Read and check both files; without validation rows, hold out whole contexts with all their questions."""
    rows, given = read_both(train, valid, lambda path, part: read_answer_rows(path, schema, part))
    if not any(row.answers for row in rows):
        raise TrainingDataInvalid(train, None, "no question has an answer: there is nothing to learn")
    kept, held_out = grouped_rows(train, rows, given, lambda row: row.context, "context", valid_share, seed)
    return TaskRows(kept, held_out)


def _cells(path: Path, schema: AnswerSchema, part: Part) -> Iterator[Cells]:
    if path.suffix.lower() == ".json" and not path.is_dir():
        text = decode(path)
        if text.lstrip()[:1] == "{":
            yield from _squad_cells(path, read_json(path, text), schema)
            return
    yield from read_cells(path, schema.columns, part)


def _squad_cells(path: Path, value: Any, schema: AnswerSchema) -> Iterator[Cells]:
    if not is_squad(value):
        message = "is neither SQuAD's JSON, an object with data, nor an array of objects"
        raise TrainingDataInvalid(path, None, f"{message}; if it has one object a line, let its name end in .jsonl")
    for place, question, context in read_squad(path, value):
        cells = {schema.question: question.get("question"), schema.context: context, schema.id: question.get("id")}
        yield place, {**cells, schema.answers: _squad_answers(place, question)}


def _squad_answers(place: Place, question: Mapping[str, Any]) -> object:
    answers, impossible = question.get("answers", []), question.get("is_impossible")
    if impossible is True and answers:
        raise place.invalid("is_impossible is true, and there are answers; leave one out")
    if impossible is False and not answers:
        raise place.invalid("is_impossible is false, and there is no answer; add one or set it to true")
    return answers


def _row(number: int, place: Place, cells: Mapping[str, object], schema: AnswerSchema) -> AnswerRow:
    try:
        question = text_of(schema.question, cells[schema.question])
        context = text_of(schema.context, cells[schema.context])
        given = cells.get(schema.id)
        name = str(number) if given is None or given == "" else str(given)
        found = tuple((locate(context, text, start), text) for start, text in _given_answers(cells, schema))
        return AnswerRow(question, context, tuple(dict.fromkeys(found)), name, place)
    except ValueError as error:
        shown = cells.get(schema.id)
        named = place.name or shown is None
        raise place.invalid(str(error) if named else f"question {str(shown)[:64]!r}: {error}") from error


def _given_answers(cells: Mapping[str, object], schema: AnswerSchema) -> list[tuple[int | None, str]]:
    """(start or None, text) of each answer."""
    if schema.answers in cells:
        return [_answer(schema, text, start) for text, start in _pairs(schema.answers, cells[schema.answers])]
    if schema.answer not in cells:
        names = f"{schema.answers} nor {schema.answer}"
        raise ValueError(f"there is neither {names}; the row has {', '.join(cells)}")
    text, start = cells[schema.answer], cells.get(schema.answer_start)
    if text is None or text == "":
        return []
    return [_answer(schema, text, None if start == "" else start)]


def _pairs(column: str, value: object) -> list[tuple[object, object]]:
    """(text, start) of SQuAD's list of objects, of the library datasets' object of lists, or of a single object."""
    if isinstance(value, list):
        return [pair for item in value for pair in _pairs(column, _object(column, item))]
    cells = _object(column, value)
    texts, starts = cells.get("text"), cells.get("answer_start")
    if not isinstance(texts, list):
        return [(texts, starts)]
    if starts is None:
        return [(text, None) for text in texts]
    starts = list_of(f"{column}.answer_start", starts)
    if len(starts) != len(texts):
        raise ValueError(f"{column} has {len(texts)} texts and {len(starts)} values of answer_start")
    return list(zip(texts, starts, strict=True))


def _object(column: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{column} is {kind_of(value)}, not an object with text and answer_start")
    return value


def _answer(schema: AnswerSchema, text: object, start: object) -> tuple[int | None, str]:
    return (
        None if start is None else whole_number_of(schema.answer_start, start),
        text_of("an answer's text", text),
    )
