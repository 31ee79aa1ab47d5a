"""Files of every kind hold the same rows: arrays, dataset folders, parquet; and what is refused of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, disable_progress_bars

from lora_runtime.train.rows.answer import AnswerSchema, read_answer_rows
from lora_runtime.train.rows.classify import ClassifySchema, load_classify_rows, read_classify_rows
from lora_runtime.train.rows.files import Columns, Part, has_validation, read_cells
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.tokens import TokensSchema, read_tokens_rows
from tests.unit.training_files import refusal, write

SCHEMA = ClassifySchema()
COLUMNS = Columns(("text", "label"))
TOPICS = ClassLabel(names=["world", "sports"])


@pytest.fixture(autouse=True)
def _quiet() -> None:
    disable_progress_bars()


def topics(*classes: int, text: str = "t") -> Dataset:
    rows = {"text": [f"{text}{n}" for n in range(len(classes))], "label": list(classes), "image": [b""] * len(classes)}
    return Dataset.from_dict(rows, Features({"text": Value("string"), "label": TOPICS, "image": Value("binary")}))


def test_the_objects_of_an_array_have_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '\ufeff [{"text": "a",\n"label": 1},\n\n {"text": "b", "label": "x"}\n]\n')
    assert [(place.line, dict(cells)) for place, cells in read_cells(path, COLUMNS)] == [
        (1, {"text": "a", "label": 1}),
        (4, {"text": "b", "label": "x"}),
    ]


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("", None, "has no rows"),
        ("[]", None, "has no rows"),
        (
            '{"text": "a"}',
            None,
            "is not a JSON array of objects; if it has one object a line, let its name end in .jsonl",
        ),
        ('[{"text": "a", "label": 1}\n{"text"', 2, "a comma or ] is missing"),
        ('[{"text": "a", "label": 1},\n{"text" 3}]', 2, "is not valid JSON"),
        ('[{"text": "a", "label": 1},\n', 2, "is not valid JSON"),
        ('[{"text": "a", "label": 1},\n]', 2, "is not valid JSON"),
        ('[{"text": "a", "label": 1}]\n[]', 2, "more follows its end"),
        ("[\n3]", 2, "holds a JSON int, not an object"),
        ('[{"text": "a"}]', 1, "field 'label' is missing; the row has text"),
        ('[{"text": "a", "text": "b", "label": 1}]', 1, "an object names 'text' twice"),
        ("[" * 100_000, 1, "is not valid JSON"),
    ],
)
def test_a_bad_array_is_refused_with_its_line(tmp_path: Path, content: str, line: int | None, says: str) -> None:
    error = refusal(lambda: read_classify_rows(write(tmp_path, "a.json", content), SCHEMA))
    assert error.line == line
    assert says in error.message


def test_a_saved_dataset_gives_names_for_the_integers_of_its_classes(tmp_path: Path) -> None:
    topics(0, 1).save_to_disk(tmp_path / "saved")
    topics(0, 1).to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        rows = read_classify_rows(path, SCHEMA)
        assert [(row.text, row.labels) for row in rows] == [("t0", ("world",)), ("t1", ("sports",))]
        assert rows[1].place == Place(path, None, "row 2")


def test_classes_in_lists_and_lists_of_answers_are_read(tmp_path: Path) -> None:
    tags = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-X"]))})
    Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, tags).save_to_disk(tmp_path / "tags")
    assert read_tokens_rows(tmp_path / "tags", TokensSchema())[0].tags == ("B-X", "O")
    answers: dict[str, list[Any]] = {"text": ["lake"], "answer_start": [2]}
    rows = {"id": ["q"], "question": ["What?"], "context": ["a lake"], "answers": [answers]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "squad")
    assert read_answer_rows(tmp_path / "squad", AnswerSchema())[0].answers == ((2, "lake"),)


def save_dict(folder: Path, **parts: Dataset) -> Path:
    DatasetDict(parts).save_to_disk(folder)
    return folder


def save_parquet(folder: Path, **parts: Dataset) -> Path:
    (folder / "data").mkdir(parents=True)
    for name, rows in parts.items():
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def save_converted(folder: Path, **parts: Dataset) -> Path:
    for name, rows in parts.items():
        (folder / name).mkdir(parents=True)
        rows.to_parquet(folder / name / "0000.parquet")
    return folder


@pytest.mark.parametrize("save", [save_dict, save_parquet, save_converted])
@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_a_folder_of_splits_gives_training_and_validation_rows(tmp_path: Path, save: Any, name: str) -> None:
    splits = {"train": topics(0, 1, 0, 1), name: topics(1, text="v"), "test": topics(0, text="x")}
    path = save(tmp_path / "d", **splits)
    assert has_validation(path)
    rows = load_classify_rows(path, None, SCHEMA, 0.5, 0)
    assert len(rows.train) == 4
    assert [row.text for row in rows.valid] == ["v0"]
    # a file that is given comes before the folder's own
    other = write(tmp_path, "other.csv", "text,label\nz,world\n")
    assert [row.text for row in load_classify_rows(path, other, SCHEMA, 0.5, 0).valid] == ["z"]
    assert [row.text for row in load_classify_rows(other_train(tmp_path), path, SCHEMA, 0.5, 0).valid] == ["v0"]


def other_train(folder: Path) -> Path:
    return write(folder, "train.csv", "text,label\na,world\nb,sports\nc,world\nd,sports\n")


@pytest.mark.parametrize("save", [save_dict, save_parquet, save_converted])
def test_without_a_validation_split_rows_are_held_out(tmp_path: Path, save: Any) -> None:
    path = save(tmp_path / "d", train=topics(0, 1, 0, 1), test=topics(0, text="x"))
    assert not has_validation(path)
    rows = load_classify_rows(path, None, SCHEMA, 0.5, 0)
    assert (len(rows.train), len(rows.valid)) == (2, 2)
    error = refusal(lambda: read_classify_rows(path, SCHEMA, Part.VALID))
    assert "has no split called validation; it has test, train" in error.message.replace("train, test", "test, train")


def test_parquet_files_that_name_no_split_are_all_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        topics(0, text=name).to_parquet(tmp_path / f"{name}.parquet")
    rows = read_classify_rows(tmp_path, SCHEMA)
    assert [(row.text, row.place) for row in rows] == [
        ("a0", Place(tmp_path / "a.parquet", None, "row 1")),
        ("b0", Place(tmp_path / "b.parquet", None, "row 1")),
    ]
    topics(0).to_parquet(tmp_path / "train.parquet")
    assert (
        "a.parquet names no split, and train.parquet does"
        in refusal(lambda: read_classify_rows(tmp_path, SCHEMA)).message
    )


def test_a_bad_folder_is_refused(tmp_path: Path) -> None:
    def says(path: Path) -> str:
        return refusal(lambda: read_classify_rows(path, SCHEMA)).message

    assert "is a folder without a dataset" in says(tmp_path)
    assert "cannot be read (No such file" in says(tmp_path / "absent")
    assert "cannot be read (No such file" in says(tmp_path / "absent.parquet")
    assert "cannot be read as a dataset" in says(write(tmp_path, "b.parquet", b"PAR1 no, it is not"))
    topics(0).remove_columns("label").save_to_disk(tmp_path / "d")
    assert "column 'label' is missing; it has text, image" in says(tmp_path / "d")
    topics(0, -1).save_to_disk(tmp_path / "e")
    assert "e: row 2: label is null" in says(tmp_path / "e")
    (tmp_path / "d" / "data-00000-of-00001.arrow").write_bytes(b"broken")
    assert "cannot be read as a dataset" in says(tmp_path / "d")


def test_a_folder_without_the_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topics(0).save_to_disk(tmp_path / "d")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = refusal(lambda: read_classify_rows(tmp_path / "d", SCHEMA)).message
    assert "pip install 'multilora[datasets]'" in message


def test_files_and_folders_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": 'höher, "weiter"', "label": "a"}, {"text": "line\u2028separator", "label": "b"}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    array = write(tmp_path, "a.json", json.dumps(rows))
    lines = write(tmp_path, "a.ndjson", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    for path in (tmp_path / "d", array, lines):
        assert [{"text": r.text, "label": r.labels[0]} for r in read_classify_rows(path, SCHEMA)] == rows
