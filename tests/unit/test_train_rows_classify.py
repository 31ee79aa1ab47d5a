"""Training files: what is read, and what is refused with the file and the line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.classify import (
    ClassifyRow,
    ClassifySchema,
    load_classify_rows,
    read_classify_rows,
    split_classify_rows,
)
from lora_runtime.train.rows.place import Place
from lora_runtime.types import ProblemType

SINGLE = ClassifySchema()
MULTI = ClassifySchema(problem_type=ProblemType.MULTI_LABEL)
REGRESSION = ClassifySchema(label="stars", problem_type=ProblemType.REGRESSION)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, schema: ClassifySchema = SINGLE) -> TrainingDataInvalid:
    with pytest.raises(TrainingDataInvalid) as caught:
        read_classify_rows(path, schema)
    assert str(path) in caught.value.message
    if caught.value.line is not None:
        assert f"{path}:{caught.value.line}:" in caught.value.message
    return caught.value


def test_csv_rows_keep_their_text_label_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '\ufefftext,label\n"one, ""quoted""\nover two lines", spam \n\nplain,ham\n')
    assert read_classify_rows(path, SINGLE) == (
        ClassifyRow('one, "quoted"\nover two lines', None, ("spam",), 0.0, Place(path, 2)),
        ClassifyRow("plain", None, ("ham",), 0.0, Place(path, 5)),
    )


def test_tsv_and_jsonl_hold_the_same_rows_as_csv(tmp_path: Path) -> None:
    rows = [("höher, weiter", "a"), ("line\u2028separator", "b")]
    comma = write(tmp_path, "r.csv", 'text,label\n"höher, weiter",a\nline\u2028separator,b\n')
    tabs = write(tmp_path, "r.tsv", "text\tlabel\nhöher, weiter\ta\nline\u2028separator\tb\n")
    lines = "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows)
    jsonl = write(tmp_path, "r.jsonl", lines)
    read = [[(row.text, row.labels[0]) for row in read_classify_rows(path, SINGLE)] for path in (comma, tabs, jsonl)]
    assert read == [rows, rows, rows]


def test_quotes_of_a_tsv_are_letters_where_they_enclose_no_field(tmp_path: Path) -> None:
    plain = write(tmp_path, "a.tsv", 'text\tlabel\n"Hi," he said.\ta\r\n"whole"\t"b\n')
    assert [(row.text, row.labels, row.place.line) for row in read_classify_rows(plain, SINGLE)] == [
        ('"Hi," he said.', ("a",), 2),
        ('"whole"', ('"b',), 3),
    ]
    excel = write(tmp_path, "b.tsv", 'text\tlabel\n"one, ""quoted""\nover\ttwo lines"\ta\n"whole"\t"b"\n')
    assert [(row.text, row.labels, row.place.line) for row in read_classify_rows(excel, SINGLE)] == [
        ('one, "quoted"\nover\ttwo lines', ("a",), 2),
        ("whole", ("b",), 4),
    ]
    open_quote = write(tmp_path, "c.tsv", 'text\tlabel\n"never closed\tx\tmore\nu\ty\n')
    assert "is a quote left open?" in refusal(open_quote).message


def test_column_names_can_be_chosen_and_other_columns_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "id,premise,hypothesis,gold\n7,it rains,it is wet,yes\n")
    schema = ClassifySchema(text="premise", text_pair="hypothesis", label="gold")
    assert read_classify_rows(path, schema) == (ClassifyRow("it rains", "it is wet", ("yes",), 0.0, Place(path, 2)),)


def test_a_column_called_text_pair_is_taken_without_being_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a", "text_pair": "b", "label": 1}\n')
    assert read_classify_rows(path, SINGLE) == (ClassifyRow("a", "b", ("1",), 0.0, Place(path, 1)),)


def test_multi_label_rows_are_joined_strings_or_lists_and_may_be_empty(tmp_path: Path) -> None:
    joined = write(tmp_path, "a.csv", "text,label\nt,b| a\nu,\n")
    listed = write(tmp_path, "a.jsonl", '{"text": "t", "label": ["b", "a"]}\n{"text": "u", "label": []}\n')
    for path in (joined, listed):
        assert [row.labels for row in read_classify_rows(path, MULTI)] == [("b", "a"), ()]


def test_regression_reads_numbers(tmp_path: Path) -> None:
    joined = write(tmp_path, "a.csv", "text,stars\nt,4.5\nu,-1e1\n")
    listed = write(tmp_path, "a.jsonl", '{"text": "t", "stars": 4.5}\n{"text": "u", "stars": "-10"}\n')
    for path in (joined, listed):
        assert [row.value for row in read_classify_rows(path, REGRESSION)] == [4.5, -10.0]


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.csv", "text,category\nt,x\n", 1, "column 'label' is missing; the header names text, category"),
        ("a.csv", "", 1, "column 'text' is missing"),
        ("a.csv", "text,label,label\nt,x,y\n", 1, "names a column twice"),
        ("a.csv", "text,label\nt,x\nno comma\n", 3, "has 1 fields, the header has 2"),
        ("a.csv", "text,label\nt, \n", 2, "label is empty"),
        ("a.csv", "text,label\nt,x\n ,x\n", 3, "text is empty"),
        ("a.csv", 'text,label\nt,x\n"never closed,x\nu,y\n', 3, "is a quote left open?"),
        ("a.csv", b"text,label\nt,x\ncaf\xe9,x\n", 3, "byte 0xe9 is not valid UTF-8"),
        ("a.csv", "text,label\n", None, "has no rows"),
        ("a.jsonl", '{"text": "t", "label": "x"}\n\n{"text": "t" "label"}\n', 3, "is not valid JSON"),
        ("a.jsonl", '{"text": "t"}\n', 1, "field 'label' is missing"),
        ("a.jsonl", '["t", "x"]\n', 1, "holds a JSON list, not an object"),
        ("a.jsonl", '{"text": 5, "label": "x"}\n', 1, "text is a number, not a string"),
        ("a.jsonl", '{"text": "t", "label": null}\n', 1, "label is null"),
        ("a.jsonl", '{"text": "t", "label": true}\n', 1, "label is a boolean"),
        ("a.jsonl", '{"text": "t", "label": ["x"]}\n', 1, "label is a list"),
        ("a.jsonl", '{"text": "\\ud800", "label": "x"}\n', 1, "half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000 + "\n", 1, "is not valid JSON"),
        ("a.jsonl", '{"text":"t","text_pair":"u","label":"x"}\n{"text":"t","label":"x"}\n', 2, "lacks text_pair"),
        ("a.xlsx", "", None, "the ending must be one of .csv, .json, .jsonl, .ndjson, .parquet, .tsv, or the path"),
        ("a.csv", "text,label\nt," + "x" * 257, 2, "label has 257 characters, a label's name has at most 256"),
        ("a.jsonl", '{"text": "t", "label": "x", "label": "y"}\n', 1, "an object names 'label' twice"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, line: int | None, says: str
) -> None:
    error = refusal(write(tmp_path, name, content))
    assert error.line == line
    assert says in error.message


@pytest.mark.parametrize(
    ("schema", "row", "says"),
    [
        (REGRESSION, {"text": "t", "stars": "many"}, "stars is 'many', not a number"),
        (REGRESSION, {"text": "t", "stars": "nan"}, "not a finite number"),
        (REGRESSION, {"text": "t", "stars": ""}, "stars is empty"),
        (REGRESSION, {"text": "t", "stars": False}, "stars is a boolean"),
        (MULTI, {"text": "t", "label": "a|b|a"}, "names a label twice"),
        (MULTI, {"text": "t", "label": ["a", ""]}, "label is empty"),
        (MULTI, {"text": "t", "label": 3}, "not a list or a string"),
    ],
)
def test_a_label_that_does_not_fit_the_problem_type_is_refused(
    tmp_path: Path, schema: ClassifySchema, row: dict[str, object], says: str
) -> None:
    error = refusal(write(tmp_path, "a.jsonl", json.dumps(row)), schema)
    assert error.line == 1
    assert says in error.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.csv").message


def test_a_refusal_does_not_repeat_the_text(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, "a.jsonl", '{"text": "confidential", "label": null}'))
    assert "confidential" not in error.message


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=20))
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    rows = [row for row in rows if all(cell.strip() and "\0" not in cell and cell.isprintable() for cell in row)]
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([("text", "label"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), "a.csv", stream.getvalue())
    if rows:
        read = [(row.text, row.labels[0]) for row in read_classify_rows(path, SINGLE)]
        assert read == [(text, label.strip()) for text, label in rows]


def rows_of(counts: dict[str, int]) -> list[ClassifyRow]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return [
        ClassifyRow(f"text {line}", None, (name,), 0.0, Place(Path("rows"), line)) for line, name in enumerate(names)
    ]


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=2),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32 - 1),
)
def test_every_label_is_trained_on_and_measured_where_it_has_two_rows(
    counts: dict[str, int], share: float, seed: int
) -> None:
    rows = rows_of(counts)
    train, valid = split_classify_rows(rows, share, seed, ProblemType.SINGLE_LABEL)
    assert sorted(row.place.line for row in (*train, *valid)) == [row.place.line for row in rows]
    for name, count in counts.items():
        held_out = sum(row.labels == (name,) for row in valid)
        assert held_out == min(max(1, round(share * count)), count - 1)
    assert split_classify_rows(rows, share, seed, ProblemType.SINGLE_LABEL) == (train, valid)


def test_another_seed_holds_out_other_rows() -> None:
    rows = rows_of({"a": 50, "b": 50})
    splits = {split_classify_rows(rows, 0.1, seed, ProblemType.SINGLE_LABEL)[1] for seed in range(5)}
    assert len(splits) == 5


def test_labels_are_sorted_and_as_numbers_where_they_are_numbers(tmp_path: Path) -> None:
    names = write(tmp_path, "n.csv", "text,label\n" + "".join(f"t,{name}\n" for name in ("b", "a10", "a9", "b")))
    numbers = write(tmp_path, "d.csv", "text,label\n" + "".join(f"t,{name}\n" for name in (10, 9, 10, 9)))
    assert load_classify_rows(names, None, SINGLE, 0.5, 0).labels == ("a10", "a9", "b")
    assert load_classify_rows(numbers, None, SINGLE, 0.5, 0).labels == ("9", "10")


@pytest.mark.parametrize(
    ("schema", "content", "says"),
    [
        (SINGLE, "text,label\nt,a\nu,a\nv,a\nw,a\n", "has only one label, 'a'"),
        (SINGLE, "text,label\nt,a\nu,b\n", "has 2 rows, training needs at least 4"),
        (SINGLE, "text,label\nt,a\nu,b\nv,c\nw,d\n", "no label has two rows"),
        (MULTI, "text,label\nt,\nu,\nv,\nw,\n", "no row names a label"),
        (REGRESSION, "text,stars\nt,2\nu,2\nv,2\nw,2\n", "every stars is the same"),
    ],
)
def test_a_file_that_teaches_nothing_is_refused(
    tmp_path: Path, schema: ClassifySchema, content: str, says: str
) -> None:
    path = write(tmp_path, "a.csv", content)
    with pytest.raises(TrainingDataInvalid, match=says):
        load_classify_rows(path, None, schema, 0.1, 0)


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("text,label\nt,a\nu,c\n", 3, "label 'c' does not occur in the training file"),
        ("text,text_pair,label\nt,u,a\n", 2, "one file holds text pairs, the other single texts"),
    ],
)
def test_a_validation_file_that_does_not_match_is_refused(tmp_path: Path, content: str, line: int, says: str) -> None:
    train = write(tmp_path, "train.csv", "text,label\nt,a\nu,b\nv,a\nw,b\n")
    valid = write(tmp_path, "valid.csv", content)
    with pytest.raises(TrainingDataInvalid, match=says) as caught:
        load_classify_rows(train, valid, SINGLE, 0.1, 0)
    assert (caught.value.path, caught.value.line) == (valid, line)
