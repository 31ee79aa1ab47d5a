"""Rows of token classification: the words of a sentence and a tag each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.answers.tags import OUTSIDE, parse_tag
from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.cells import label_of, list_of, text_of
from lora_runtime.train.rows.conll import ENDINGS, read_conll
from lora_runtime.train.rows.files import Columns, Part, decode, read_cells
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.split import TaskRows, grouped_rows, read_both, require_rows, sorted_labels

DEFAULT_TAGS = ("tags", "ner_tags")
_PREFIXES = tuple(f"{letter}-" for letter in "BIESLU")  # of IOB, IOB2, IOBES and BILOU

_Sentence = tuple[Place, Sequence[object], Sequence[object]]  # place, words, tags


@dataclass(frozen=True, slots=True)
class TokensSchema:
    """Columns of files that are not CoNLL; `tags` None takes `tags`, else `ner_tags`."""

    words: str = "tokens"
    tags: str | None = None

    @property
    def columns(self) -> Columns:
        return Columns((self.words,), DEFAULT_TAGS) if self.tags is None else Columns((self.words, self.tags))


@dataclass(frozen=True, slots=True)
class TokensRow:
    """One sentence; `tags` has a tag for each word, `O` outside every entity, `B-PER` or a plain name inside."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    place: Place


def read_tokens_rows(path: Path, schema: TokensSchema, part: Part = Part.TRAIN) -> tuple[TokensRow, ...]:
    """All sentences of a file or folder; raises TrainingDataInvalid at the first that is wrong."""
    return require_rows(path, (_row(*sentence) for sentence in _sentences(path, schema, part)))


def load_tokens_rows(
    train: Path, valid: Path | None, schema: TokensSchema, valid_share: float, seed: int
) -> TaskRows[TokensRow]:
    """Read and check both files; without validation rows, hold out sentences, equal ones on one side.

    `labels` are the tags of both files, sorted. A validation file may have a tag that the training file lacks (`I-X`
    beside `B-X`), but no other kind of entity. Raises TrainingDataInvalid.
    """
    rows, given = read_both(train, valid, lambda path, part: read_tokens_rows(path, schema, part))
    tags = {tag for row in rows for tag in row.tags}
    if len(tags) == 1:
        message = f"every tag is {next(iter(tags))!r}: there is nothing to learn; is the tag the last column?"
        raise TrainingDataInvalid(train, None, message)
    if given is not None:
        _check_same_entities(given, tags)
        tags |= {tag for row in given for tag in row.tags}
    kept, held_out = grouped_rows(train, rows, given, lambda row: row.words, "sentence", valid_share, seed)
    return TaskRows(kept, held_out, sorted_labels(tags))


def _sentences(path: Path, schema: TokensSchema, part: Part) -> Iterator[_Sentence]:
    if path.suffix.lower() in ENDINGS and not path.is_dir():
        yield from read_conll(path, decode(path))
        return
    for place, cells in read_cells(path, schema.columns, part, ENDINGS):
        try:
            yield place, list_of(schema.words, cells[schema.words]), _tags(cells, schema)
        except ValueError as error:
            raise place.invalid(str(error)) from error


def _tags(cells: Mapping[str, object], schema: TokensSchema) -> list[object]:
    names = DEFAULT_TAGS if schema.tags is None else (schema.tags,)
    for name in names:
        if name in cells:
            return list_of(name, cells[name])
    raise ValueError(f"there is neither {' nor '.join(names)}; the row has {', '.join(cells)}; name the tags' column")


def _row(place: Place, words: Sequence[object], tags: Sequence[object]) -> TokensRow:
    if len(words) != len(tags):
        raise place.invalid(f"has {len(words)} words and {len(tags)} tags; every word needs one tag")
    if not words:
        raise place.invalid("has no words; leave the sentence out")
    try:
        return TokensRow(
            tuple(text_of(f"word {index}", word) for index, word in enumerate(words, start=1)),
            tuple(_tag(index, tag) for index, tag in enumerate(tags, start=1)),
            place,
        )
    except ValueError as error:
        raise place.invalid(str(error)) from error


def _tag(index: int, value: object) -> str:
    tag = label_of(f"tag {index}", value)
    if tag in _PREFIXES:
        raise ValueError(f"tag {index} is {tag!r} and names no kind of entity; write one behind it, as in B-PER")
    return tag


def _check_same_entities(valid: Sequence[TokensRow], tags: set[str]) -> None:
    known = {parse_tag(tag, tags).kind for tag in tags} | {OUTSIDE}
    every = tags.union(*(row.tags for row in valid))
    for row in valid:
        for tag in row.tags:
            if parse_tag(tag, every).kind not in known:
                raise row.place.invalid(f"tag {tag!r} does not occur in the training file")
