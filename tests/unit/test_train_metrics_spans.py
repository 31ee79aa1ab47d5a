"""Exact match and F1 of answers: the official script's own arithmetic, and Chinese by the character."""

from __future__ import annotations

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.train.metrics.spans import exact_match, f1, normalize, score_spans


def official_normalize(text: str) -> str:
    """`normalize_answer` of SQuAD's evaluate-v2.0.py."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(gold: str, predicted: str) -> float:
    """`compute_f1` of SQuAD's evaluate-v2.0.py."""
    gold_tokens, found_tokens = official_normalize(gold).split(), official_normalize(predicted).split()
    if len(gold_tokens) == 0 or len(found_tokens) == 0:
        return float(gold_tokens == found_tokens)
    num_same = sum((collections.Counter(gold_tokens) & collections.Counter(found_tokens)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(found_tokens), num_same / len(gold_tokens)
    return (2 * precision * recall) / (precision + recall)


TEXTS = st.lists(
    st.sampled_from(["the", "The", "a", "an", "cat", "Cat's", "dog,", "theme", " ", "\t", "-", "“x”", "é", "3.5"])
).map(" ".join)


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_scores_are_those_of_the_official_script(prediction: str, answers: list[str]) -> None:
    wanted = [answer for answer in answers if official_normalize(answer)] or [""]
    assert normalize(prediction) == official_normalize(prediction)
    exact = max(official_normalize(prediction) == official_normalize(answer) for answer in wanted)
    assert exact_match(prediction, answers) == float(exact)
    assert f1(prediction, answers) == pytest.approx(max(official_f1(answer, prediction) for answer in wanted))


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "overlap"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("the tower", ["Eiffel Tower", "a big tower"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("", ["something"], 0.0, 0.0),
        ("光荣公司", ["光荣"], 0.0, 2 * 2 / (4 + 2)),
        ("《战国无双》。", ["战国无双"], 1.0, 1.0),
        ("“光荣”", ["光荣"], 1.0, 1.0),
        ("光荣 Koei 公司", ["光荣Koei"], 0.0, 2 * 3 / (5 + 3)),
        ("カタカナー", ["カタカナ"], 0.0, 2 * 4 / (5 + 4)),
    ],
)
def test_answers_by_hand(prediction: str, answers: list[str], exact: float, overlap: float) -> None:
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(overlap)


def test_means_tell_answerable_and_unanswerable_questions_apart() -> None:
    found = score_spans(["lake", "the big lake", "x", ""], [["a lake"], ["lake"], [], []])
    assert found == pytest.approx(
        {
            "exact_match": 2 / 4,
            "f1": (1 + 2 / 3 + 0 + 1) / 4,
            "answerable_exact_match": 1 / 2,
            "answerable_f1": (1 + 2 / 3) / 2,
            "unanswerable_accuracy": 1 / 2,
        }
    )
    assert score_spans(["lake"], [["a lake"]]) == {"exact_match": 1.0, "f1": 1.0}
