"""Questions on contexts: SQuAD's JSON, columns, answers in their place, and contexts kept on one side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.train.rows.answer import AnswerRow, AnswerSchema, load_answer_rows, read_answer_rows
from lora_runtime.train.rows.locate import locate
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.split import hold_out_groups
from tests.unit.training_files import refusal, write, write_lines

SCHEMA = AnswerSchema()
CONTEXT = "Zürich is a city. Zürich has a lake."


def squad(*questions: dict[str, Any], context: object = CONTEXT) -> str:
    paragraphs = [{"context": context, "qas": list(questions)}]
    return json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})


def question(*answers: tuple[str, object], **more: object) -> dict[str, Any]:
    listed = [{"text": text, **({} if start is None else {"answer_start": start})} for text, start in answers]
    return {"id": "q1", "question": "What?", "answers": listed, **more}


def test_squad_1_and_2_questions_are_read_with_all_their_answers(tmp_path: Path) -> None:
    first = question(("lake", 31), ("a lake", 29), ("lake", 31))
    path = write(
        tmp_path, "a.json", squad(first, question(is_impossible=True, plausible_answers=[{"text": "x"}], id=7))
    )
    assert read_answer_rows(path, SCHEMA) == (
        AnswerRow("What?", CONTEXT, ((31, "lake"), (29, "a lake")), "q1", Place(path, None, "question 'q1'")),
        AnswerRow("What?", CONTEXT, (), "7", Place(path, None, "question 7")),
    )


def test_columns_hold_the_same_in_each_of_their_forms(tmp_path: Path) -> None:
    base = {"question": "What?", "context": CONTEXT}
    forms: list[dict[str, object]] = [
        {**base, "answers": {"text": ["lake"], "answer_start": [31]}},
        {**base, "answers": {"text": ["lake"]}},
        {**base, "answers": [{"text": "lake", "answer_start": 31}]},
        {**base, "answers": {"text": "lake", "answer_start": 31}},
        {**base, "answer": "lake", "answer_start": 31},
        {**base, "answer": "lake"},
        {**base, "answer": "lake", "answer_start": None},
    ]
    rows = read_answer_rows(write_lines(tmp_path, "a.jsonl", forms), SCHEMA)
    assert [row.answers for row in rows] == [((31, "lake"),)] * len(forms)
    assert [(row.id, row.place.line) for row in rows] == [(str(n), n) for n in range(1, len(forms) + 1)]
    array = read_answer_rows(write(tmp_path, "a.json", json.dumps(forms, indent=1)), SCHEMA)
    assert [row.answers for row in array] == [row.answers for row in rows]
    table = f"id,question,context,answer,answer_start\nx,What?,{CONTEXT},lake,31\n,What?,{CONTEXT},,\n"
    found = read_answer_rows(write(tmp_path, "a.csv", table), SCHEMA)
    assert [(row.id, row.answers) for row in found] == [("x", ((31, "lake"),)), ("2", ())]


def test_columns_without_an_answer_are_unanswerable(tmp_path: Path) -> None:
    base = {"question": "What?", "context": CONTEXT}
    forms = [{"answers": {"text": [], "answer_start": []}}, {"answers": []}, {"answer": ""}, {"answer": None}]
    rows = read_answer_rows(write_lines(tmp_path, "a.jsonl", [{**base, **form} for form in forms]), SCHEMA)
    assert [row.answers for row in rows] == [()] * 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (squad(question(("lake", 30))), "question 'q1': an answer is not at character 30 of its context but at 31"),
        (squad(question(("lake", 33))), "correct answer_start (characters from 0; the given one counts bytes)"),
        (squad(question(("Zürich", 3))), "not at character 3 of its context but at 0, 18"),
        (squad(question(("Zürich", -1))), "not at character -1 of its context but at 0, 18"),
        (
            squad(question(("Zürich", None))),
            "occurs more than once, at characters 0, 18; say which by its answer_start",
        ),
        (squad(question(("river", 3))), "question 'q1': an answer does not occur in its context"),
        (squad(question(("lake", "x"))), "answer_start is 'x', not a number"),
        (squad(question(("lake", 1.5))), "answer_start is 1.5, not a whole number"),
        (squad(question((" ", 9))), "an answer's text is empty"),
        (squad(question(("lake", 31), is_impossible=True)), "is_impossible is true, and there are answers"),
        (squad(question(is_impossible=False)), "is_impossible is false, and there is no answer"),
        (squad({"id": "q", "question": " ", "answers": []}), "question 'q': question is empty"),
        (squad({"id": "q", "answers": []}), "question is null, not a string"),
        (squad({"question": "What?", "answers": 3}), "question 1: answers is a number, not an object"),
        (squad(question(), context=""), "context is empty"),
        (squad(question(), context="\ud800"), "context holds half of a surrogate pair at character 1"),
        ('{"data": [{"title": "t"}]}', "data[0].paragraphs is null, not a list"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "data[0].paragraphs[0] has no context"),
        ('{"data": [3]}', "data[0] is a number, not an object"),
        ('{"data": []}', "has no rows"),
        ('{"rows": []}', "is neither SQuAD's JSON, an object with data, nor an array"),
        ('{"data": []}\n{"data": []}', "more follows its end); if it has one object a line"),
        ('{"data": [\n{"a": 1,}]}', "is not valid JSON"),
        ("", "has no rows"),
    ],
)
def test_a_bad_squad_file_is_refused_with_the_question(tmp_path: Path, content: str, says: str) -> None:
    path = write(tmp_path, "a.json", content)
    assert says in refusal(lambda: read_answer_rows(path, SCHEMA)).message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "lake", "answer_start": 3, "id": "q9"}, "question 'q9': an answer is not at character 3"),
        ({"answers": {"text": ["lake"], "answer_start": []}}, "answers has 1 texts and 0 values of answer_start"),
        ({"answers": None}, "answers is null, not an object with text and answer_start"),
        ({}, "there is neither answers nor answer; the row has question, context"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, row: dict[str, object], says: str) -> None:
    good = {"question": "What?", "context": CONTEXT, "answer": "lake"}
    path = write_lines(tmp_path, "a.jsonl", [good, {"question": "What?", "context": CONTEXT, **row}])
    error = refusal(lambda: read_answer_rows(path, SCHEMA))
    assert error.line == 2
    assert says in error.message


def test_a_refusal_does_not_repeat_the_texts(tmp_path: Path) -> None:
    row = {"question": "secret question", "context": "secret context", "answer": "secret answer"}
    message = refusal(lambda: read_answer_rows(write_lines(tmp_path, "a.jsonl", [row]), SCHEMA)).message
    assert "secret" not in message


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=3), st.none() | st.integers(-2, 14))
def test_an_answer_is_only_ever_taken_where_it_stands(context: str, text: str, start: int | None) -> None:
    places = [at for at in range(len(context)) if context[at : at + len(text)] == text]
    try:
        found = locate(context, text, start)
    except ValueError:
        assert len(places) != 1 if start is None else start not in places
    else:
        assert found in places
        assert found == start or (start is None and len(places) == 1)


def test_no_context_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"question": f"What {n}?", "context": f"Context {n % 9} has a lake.", "answer": "lake"} for n in range(45)]
    path = write_lines(tmp_path, "a.jsonl", rows)
    splits: set[tuple[str, ...]] = set()
    for seed in range(6):
        found = load_answer_rows(path, None, SCHEMA, 0.25, seed)
        assert found == load_answer_rows(path, None, SCHEMA, 0.25, seed)
        assert len(found.valid) == 10
        assert not {row.context for row in found.train} & {row.context for row in found.valid}
        assert sorted(int(row.id) for row in (*found.train, *found.valid)) == list(range(1, 46))
        splits.add(tuple(row.id for row in found.valid))
    assert len(splits) > 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_groups_are_never_torn_and_both_sides_have_rows(groups: list[int], share: float, seed: int) -> None:
    rows = list(enumerate(groups))
    train, valid = hold_out_groups(rows, lambda row: row[1], share, seed)
    assert sorted((*train, *valid)) == rows
    assert list(train) == sorted(train)
    assert not {group for _, group in train} & {group for _, group in valid}
    assert bool(valid) == (len(set(groups)) > 1)
    assert train
    smallest = min(groups.count(group) for group in groups)
    assert len(valid) <= max(smallest, round(share * len(rows)), 1)


def test_files_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    row = {"question": "What?", "context": CONTEXT}
    none = write_lines(tmp_path, "none.jsonl", [{**row, "answer": ""}] * 4)
    same = write_lines(tmp_path, "same.jsonl", [{**row, "answer": "lake"}] * 4)
    assert "no question has an answer" in refusal(lambda: load_answer_rows(none, None, SCHEMA, 0.1, 0)).message
    assert "every row has the same context" in refusal(lambda: load_answer_rows(same, None, SCHEMA, 0.1, 0)).message
    assert len(load_answer_rows(same, same, SCHEMA, 0.1, 0).valid) == 4
