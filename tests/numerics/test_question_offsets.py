"""Answers of real questions come back as the characters that a person marked in the context.

A handful of texts is always read; with MULTILORA_DATA, a folder of SQuAD files, a few hundred more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from lora_runtime.answers.spans import Span, best_spans, supports_no_answer
from lora_runtime.model.encoder_text import TextEncoder, Window
from lora_runtime.types import SpanLogits
from tests.text_encoders import make_encoder

DATA = os.environ.get("MULTILORA_DATA")
SETS = ("squad1", "covidqa", "bioasq_factoid", "cmrc2018_zh")
QUESTIONS_PER_SET = 150
MAX_WINDOWS = 4096  # a paper of CovidQA has tens of thousands of tokens

RIVER = (
    "The Nile — Arabic: النيل — flows\r\nnorth for 6,650\u202fkm (4,130 mi). In A\u030aland it is called “Niilfloden”; "
    "in Chinese it is 尼罗河, in emoji 🐊🌊.  Its two tributaries are the White Nile\u200b and the Blue Nile. "
)
PAPER = "Patients received 2.5 mg/kg of the α-subunit (IL-6Rα) antibody, i.e. tocilizumab, on days 1–5; p<0.001. "


@dataclass(frozen=True, slots=True)
class Gold:
    """A question and the characters of its context that answer it."""

    question: str
    context: str
    start: int
    answer: str

    @property
    def end(self) -> int:
        return self.start + len(self.answer)


def _tokens(gold: Gold, window: Window) -> list[int]:
    """The window's tokens that show a character of the answer."""
    return [
        k
        for k, place in enumerate(window.offsets)
        if place is not None and place[0] < place[1] and place[0] < gold.end and place[1] > gold.start
    ]


def _holds(gold: Gold, window: Window) -> bool:
    places = [place for k in _tokens(gold, window) if (place := window.offsets[k]) is not None]
    first, last = gold.end - len(gold.answer.lstrip()), gold.start + len(gold.answer.rstrip())
    return bool(places) and places[0][0] <= first and places[-1][1] >= last


def _answer(gold: Gold, windows: tuple[Window, ...]) -> Span:
    """The best span for logits of a model that knows: high at the answer in windows that hold all of it."""
    rows: list[SpanLogits] = []
    for window in windows:
        start, end = [[0.01 * ((7 * k) % 5) for k in range(window.sequence.num_tokens)] for _ in range(2)]
        if _holds(gold, window):
            inside = _tokens(gold, window)
            start[inside[0]], end[inside[-1]] = 9.0, 9.0
        rows.append(SpanLogits(tuple(start), tuple(end)))
    allow = supports_no_answer(windows)
    return best_spans(windows, rows, top_k=1, max_answer_tokens=512, allow_no_answer=allow)[0]


def _windows(gold: Gold, encoder: TextEncoder, max_length: int) -> tuple[Window, ...]:
    pair = (gold.question, gold.context)
    (windows,) = encoder.encode_questions([pair], max_length=max_length, max_windows=MAX_WINDOWS)
    return windows


def _overlap(windows: tuple[Window, ...]) -> int:
    """Tokens of the context that the first two windows share."""
    first, second = (set(window.offsets) - {None} for window in windows[:2])
    return len(first & second)


def _aligns(gold: Gold, windows: tuple[Window, ...]) -> bool:
    """Whether the answer begins where a token does and ends where one does."""
    places = [place for window in windows for place in window.offsets if place is not None]
    return any(gold.start == start for start, _ in places) and any(gold.end == end for _, end in places)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (RIVER, "The Nile"), (RIVER, "6,650\u202fkm (4,130 mi)"), (RIVER, "A\u030aland"), (RIVER, "尼罗河"),
        (RIVER, "🐊🌊"), (RIVER, "النيل"), (RIVER, "north for"), (RIVER, "the Blue Nile"),
        (PAPER, "2.5 mg/kg"), (PAPER, "α-subunit (IL-6Rα) antibody"), (PAPER, "1–5"), (PAPER, "p<0.001"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("repeats", [0, 5])
def test_an_answer_is_found_in_its_window(family: str, text: str, answer: str, repeats: int) -> None:
    context = text * repeats + "Here it is: " + text + text * repeats
    gold = Gold("What is it?", context, context.index(answer, len(text) * repeats), answer)
    windows = _windows(gold, make_encoder(family), 96)
    best = _answer(gold, windows)
    assert len(windows) > 1 or not repeats
    assert (best.start, best.end) == (gold.start, gold.end)
    assert context[best.start : best.end] == answer


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="MULTILORA_DATA names no folder of SQuAD files")
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("max_length", [96, 384])
def test_answers_of_real_questions_are_found_in_their_windows(name: str, max_length: int) -> None:
    encoder = make_encoder("bert")
    found, aligned = 0, 0
    for gold in islice(_read(Path(DATA or "") / name), QUESTIONS_PER_SET):
        windows = _windows(gold, encoder, max_length)
        if not any(_holds(gold, window) for window in windows):
            seen = {window.offsets[k] for window in windows for k in _tokens(gold, window)}
            assert len(seen) > _overlap(windows), "an answer no longer than the overlap is whole in some window"
            continue
        best = _answer(gold, windows)
        text = gold.context[best.start : best.end]
        if _aligns(gold, windows):
            aligned += 1
            assert text == gold.answer
        assert gold.answer.strip() in text
        found += 1
    assert found >= 50
    assert aligned > 0.8 * found


def _read(folder: Path) -> Iterator[Gold]:
    """Questions of a folder's test file, each with the first of its answers."""
    for article in json.loads((folder / "test.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                for answer in question["answers"][:1]:
                    start, text = answer["answer_start"], answer["text"]
                    assert paragraph["context"][start : start + len(text)] == text
                    yield Gold(question["question"], paragraph["context"], start, text)
