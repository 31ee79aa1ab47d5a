"""Sentences with tags: what is read from CoNLL and from columns, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.tokens import TokensRow, TokensSchema, load_tokens_rows, read_tokens_rows
from tests.unit.training_files import refusal, write, write_lines

SCHEMA = TokensSchema()
CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


def test_conll_sentences_have_their_words_their_last_column_and_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.conll", CONLL_2003)
    assert read_tokens_rows(path, SCHEMA) == (
        TokensRow(("EU", "rejects"), ("B-ORG", "O"), Place(path, 3)),
        TokensRow(("Peter", "Blackburn"), ("B-PER", "I-PER"), Place(path, 6)),
    )


@pytest.mark.parametrize("ending", ["conll", "bio", "iob", "txt"])
def test_a_document_line_ends_a_sentence_and_windows_line_ends_do_not_matter(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, f"a.{ending}", "a O\r\n-DOCSTART- O\r\nb  B-X\r\n \r\n\r\nc O")
    assert [row.words for row in read_tokens_rows(path, SCHEMA)] == [("a",), ("b",), ("c",)]


def test_tabs_part_columns_so_that_a_word_may_hold_spaces(tmp_path: Path) -> None:
    path = write(tmp_path, "a.bio", "New York\tB-LOC\n\u3000\u00a0x\tO\n")
    assert read_tokens_rows(path, SCHEMA)[0].words == ("New York", "\u3000\u00a0x")


def test_columns_of_json_lines_hold_the_same_as_conll(tmp_path: Path) -> None:
    conll = read_tokens_rows(write(tmp_path, "a.conll", CONLL_2003), SCHEMA)
    rows = [{"tokens": row.words, "tags": row.tags} for row in conll]
    for path, schema in (
        (write_lines(tmp_path, "a.jsonl", rows), SCHEMA),
        (write_lines(tmp_path, "b.jsonl", [{"tokens": r["tokens"], "ner_tags": r["tags"]} for r in rows]), SCHEMA),
        (
            write_lines(tmp_path, "c.jsonl", [{"w": r["tokens"], "t": r["tags"], "tags": []} for r in rows]),
            TokensSchema("w", "t"),
        ),
    ):
        found = read_tokens_rows(path, schema)
        assert [(row.words, row.tags) for row in found] == [(row.words, row.tags) for row in conll]
        assert [row.place.line for row in found] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.conll", "a O\nb\n", 2, "has one column; a line is a word and its tag"),
        ("a.conll", "a NN O\nb O\n", 2, "has 2 columns, the lines before have 3"),
        ("a.conll", "a\tO\nb\t\n", 2, "the tag is empty; write O"),
        ("a.conll", "a\tO\n \tO\n", 2, "the word is empty"),
        ("a.conll", "\n\n-DOCSTART- O\n", None, "has no rows"),
        ("a.conll", b"a O\n\n\xffb O\n", 3, "byte 0xff is not valid UTF-8"),
        ("a.conll", "x O\n\na O\nb B-\n", 3, "tag 2 is 'B-' and names no kind of entity"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', 1, "has 2 words and 1 tags"),
        ("a.jsonl", '{"tokens": [], "tags": []}', 1, "has no words"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [""]}', 1, "tag 1 is empty"),
        ("a.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}', 1, "word 2 is empty"),
        ("a.jsonl", '{"tokens": ["a", 2], "tags": ["O", "O"]}', 1, "word 2 is a number, not a string"),
        ("a.jsonl", '{"tokens": ["a", "\\udc00"], "tags": ["O", "O"]}', 1, "word 2 holds half of a surrogate pair"),
        ("a.jsonl", '{"tokens": "a b", "tags": ["O", "O"]}', 1, "tokens is a string, not a list"),
        ("a.jsonl", '{"tokens": ["a"], "labels": ["O"]}', 1, "neither tags nor ner_tags; the row has tokens, labels"),
        ("a.jsonl", '{"words": ["a"], "tags": ["O"]}', 1, "field 'tokens' is missing; the row has words, tags"),
        ("a.xml", "", None, "one of .bio, .conll, .csv, .iob, .json,"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, line: int | None, says: str
) -> None:
    error = refusal(lambda: read_tokens_rows(write(tmp_path, name, content), SCHEMA))
    assert error.line == line
    assert says in error.message


def sentences(count: int, tag: str = "B-X") -> str:
    return "".join(f"w{index} {tag if index % 2 else 'O'}\n\n" for index in range(count))


def test_equal_sentences_are_kept_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path, "a.conll", sentences(6) * 5)
    for seed in range(5):
        rows = load_tokens_rows(path, None, SCHEMA, 0.3, seed)
        assert len(rows.valid) == 5
        assert not {row.words for row in rows.train} & {row.words for row in rows.valid}
        assert rows.labels == ("B-X", "O")


def test_a_validation_file_may_add_the_inside_of_a_known_entity_and_no_other_kind(tmp_path: Path) -> None:
    train = write(tmp_path, "train.conll", sentences(8))
    inside = write(tmp_path, "inside.conll", "w1 B-X\nw2 I-X\n")
    other = write(tmp_path, "other.conll", "w1 O\n\nw1 O\nw2 B-Y\n")
    assert load_tokens_rows(train, inside, SCHEMA, 0.1, 0).labels == ("B-X", "I-X", "O")
    error = refusal(lambda: load_tokens_rows(train, other, SCHEMA, 0.1, 0))
    assert (error.path, error.line) == (other, 3)
    assert "tag 'B-Y' does not occur in the training file" in error.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (sentences(8, "O"), "every tag is 'O': there is nothing to learn"),
        (sentences(3), "has 3 rows, training needs at least 4"),
        ("a O\nb B-X\n\n" * 4, "every row has the same sentence, so none can be held out"),
    ],
)
def test_a_file_that_teaches_nothing_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = write(tmp_path, "a.conll", content)
    assert says in refusal(lambda: load_tokens_rows(path, None, SCHEMA, 0.1, 0)).message
