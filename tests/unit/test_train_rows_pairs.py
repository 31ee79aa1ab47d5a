"""Rows of generation, translation and embedding."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_runtime.train.rows.embed import EmbedRow, EmbedSchema, load_embed_rows, read_embed_rows
from lora_runtime.train.rows.place import Place
from lora_runtime.train.rows.prompt import PromptRow, PromptSchema, load_prompt_rows, read_prompt_rows, translate_schema
from tests.unit.training_files import refusal, write, write_lines


def test_a_prompt_has_the_fields_of_its_template_and_a_completion(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "question,notes,reply,extra\nWhy?,because,So.,x\n")
    schema = PromptSchema({"question": "question", "facts": "notes"}, "reply")
    assert read_prompt_rows(path, schema) == (
        PromptRow({"question": "Why?", "facts": "because"}, "So.", Place(path, 2)),
    )
    default = write_lines(tmp_path, "a.jsonl", [{"prompt": " p ", "completion": " c\n"}])
    assert read_prompt_rows(default, PromptSchema()) == (PromptRow({"prompt": " p "}, " c\n", Place(default, 1)),)


def test_a_translation_has_its_source_as_the_field_that_the_rpc_fills(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "en\tzh\tnote\nHello.\t你好。\tx\n")
    assert read_prompt_rows(path, translate_schema("en", "zh")) == (
        PromptRow({"text": "Hello."}, "你好。", Place(path, 2)),
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p"}, "field 'completion' is missing; the row has prompt"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": 3, "completion": "c"}, "prompt is a number, not a string"),
        ({"prompt": "\ud83d", "completion": "c"}, "prompt holds half of a surrogate pair"),
    ],
)
def test_a_bad_prompt_is_refused_with_its_line(tmp_path: Path, row: dict[str, object], says: str) -> None:
    path = write_lines(tmp_path, "a.jsonl", [{"prompt": "p", "completion": "c"}, row])
    error = refusal(lambda: read_prompt_rows(path, PromptSchema()))
    assert error.line == 2
    assert says in error.message


def test_equal_prompts_are_kept_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n % 10}", "completion": f"c{n}"} for n in range(40)]
    path = write_lines(tmp_path, "a.jsonl", rows)
    for seed in range(4):
        found = load_prompt_rows(path, None, PromptSchema(), 0.2, seed)
        assert len(found.valid) == 8
        assert not {r.fields["prompt"] for r in found.train} & {r.fields["prompt"] for r in found.valid}
    same = write_lines(tmp_path, "b.jsonl", rows[::10])
    assert (
        "every row has the same prompt" in refusal(lambda: load_prompt_rows(same, None, PromptSchema(), 0.2, 0)).message
    )


def test_pairs_triplets_and_scored_pairs_are_told_apart_by_their_columns(tmp_path: Path) -> None:
    pair = {"text": "a", "positive": "b"}
    for more, negative, score in (({}, None, None), ({"negative": "c"}, "c", None), ({"score": 1}, None, 1.0)):
        path = write_lines(tmp_path, "a.jsonl", [{**pair, **more}])
        assert read_embed_rows(path, EmbedSchema()) == (EmbedRow("a", "b", negative, score, Place(path, 1)),)
    named = write(tmp_path, "a.csv", "q,d,n,s\na,b,c,0.5\n")
    scored = EmbedSchema("q", "d", score="s")
    assert read_embed_rows(named, scored) == (EmbedRow("a", "b", None, 0.5, Place(named, 2)),)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a", "positive": "b", "score": 5}, "score is 5.0, not within 0 and 1; divide all by the highest"),
        ({"text": "a", "positive": "b", "score": "nan"}, "score is nan, not a finite number"),
        ({"text": "a", "positive": "b", "score": 1, "negative": "c"}, "has both negative and score; keep one"),
        ({"text": "a", "positive": "b"}, "lacks score, other than the rows before it"),
        ({"text": "a", "positive": "", "score": 1}, "positive is empty"),
        ({"text": "a", "score": 1}, "field 'positive' is missing; the row has text, score"),
    ],
)
def test_a_bad_pair_is_refused_with_its_line(tmp_path: Path, row: dict[str, object], says: str) -> None:
    path = write_lines(tmp_path, "a.jsonl", [{"text": "a", "positive": "b", "score": 0.5}, row])
    error = refusal(lambda: read_embed_rows(path, EmbedSchema()))
    assert error.line == 2
    assert says in error.message


def test_both_files_of_embedding_hold_one_kind_and_different_scores(tmp_path: Path) -> None:
    pairs = [{"text": f"t{n}", "positive": "b"} for n in range(4)]
    train = write_lines(tmp_path, "train.jsonl", pairs)
    scored = write_lines(tmp_path, "valid.jsonl", [{**pair, "score": 0.5} for pair in pairs])
    error = refusal(lambda: load_embed_rows(train, scored, EmbedSchema(), 0.1, 0))
    assert (error.path, error.line) == (scored, 1)
    assert "give both the same columns" in error.message
    assert "every score is the same" in refusal(lambda: load_embed_rows(scored, None, EmbedSchema(), 0.1, 0)).message
    assert len(load_embed_rows(train, None, EmbedSchema(), 0.1, 0).valid) == 1
