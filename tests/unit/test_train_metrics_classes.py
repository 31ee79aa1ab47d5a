"""Metrics against values computed by hand, and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_matrix
from sklearn.metrics import precision_recall_fscore_support

from lora_runtime.train.metrics.classes import (
    LabelScore,
    baseline,
    confusion_matrix,
    label_scores,
    macro_f1,
    score,
)
from lora_runtime.types import ProblemType

SINGLE, MULTI, REGRESSION = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL, ProblemType.REGRESSION


def one_hot(classes: list[int], num_labels: int) -> np.ndarray:
    return np.eye(num_labels, dtype=np.float32)[classes]


def test_single_label_accuracy_and_macro_f1() -> None:
    # truth 0 0 0 1 1 2, predicted 0 0 1 1 2 2: F1 of 0 is 4/5, of 1 is 2/4, of 2 is 2/3
    logits = one_hot([0, 0, 1, 1, 2, 2], 3)
    found = score(SINGLE, logits, np.array([0, 0, 0, 1, 1, 2]))
    assert found == pytest.approx({"accuracy": 4 / 6, "macro_f1": (4 / 5 + 1 / 2 + 2 / 3) / 3})


def test_a_label_that_never_occurs_does_not_count() -> None:
    found = score(SINGLE, one_hot([0, 1], 5), np.array([0, 1]))
    assert found == {"accuracy": 1.0, "macro_f1": 1.0}


def test_a_label_that_is_never_found_counts_as_zero() -> None:
    assert score(SINGLE, one_hot([0, 0], 2), np.array([0, 1]))["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_multi_label_counts_whole_rows_and_averages_labels() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [-3.0, 1.0, -0.1], [1.0, 1.0, -2.0]])
    truth = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    # F1: column 0 is 1, column 1 is 2/3, column 2 is 2/3
    assert score(MULTI, logits, truth) == pytest.approx({"accuracy": 1 / 3, "macro_f1": (1 + 2 / 3 + 2 / 3) / 3})


def test_multi_label_without_any_label_has_an_f1_of_zero() -> None:
    assert score(MULTI, np.full((2, 3), -1.0), np.zeros((2, 3))) == {"accuracy": 1.0, "macro_f1": 0.0}


def test_regression_errors_and_correlation() -> None:
    found = score(REGRESSION, np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 5.0]))
    # deviations −4/3 −1/3 5/3 and −2 0 2: their product sums to 6, their squares to 14/3 and 8
    assert found == pytest.approx({"mse": 2 / 3, "mae": 2 / 3, "pearson": 6 / np.sqrt(14 / 3 * 8)})


def test_a_constant_prediction_has_no_correlation() -> None:
    assert score(REGRESSION, np.zeros((3, 1)), np.array([1.0, 2.0, 3.0]))["pearson"] == 0.0


def test_the_baseline_answers_the_commonest_training_class() -> None:
    found = baseline(SINGLE, np.array([2, 2, 0]), np.array([2, 1, 0, 2]))
    assert found == pytest.approx({"accuracy": 0.5, "macro_f1": (0 + 0 + 4 / 6) / 3})


def test_the_baseline_of_other_problems_is_the_commonest_set_or_the_mean() -> None:
    sets = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert baseline(MULTI, sets, sets)["accuracy"] == pytest.approx(2 / 3)
    assert baseline(REGRESSION, np.array([1.0, 3.0]), np.array([2.0, 4.0]))["mse"] == pytest.approx(2.0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_macro_f1_is_the_mean_of_the_labels_own_f1(pairs: list[tuple[int, int]]) -> None:
    predicted, truth = (np.array(column) for column in zip(*pairs, strict=True))
    scores: list[float] = []
    for label in sorted({*predicted.tolist(), *truth.tolist()}):
        hits = sum(p == label == t for p, t in pairs)
        missed = sum(t == label != p for p, t in pairs)
        wrong = sum(p == label != t for p, t in pairs)
        scores.append(2 * hits / (2 * hits + missed + wrong))
    columns = np.arange(5)
    found = macro_f1(predicted[:, None] == columns, truth[:, None] == columns)
    assert found == pytest.approx(sum(scores) / len(scores))
    single = score(SINGLE, np.eye(5)[predicted], truth)
    assert single == pytest.approx({"accuracy": sum(p == t for p, t in pairs) / len(pairs), "macro_f1": found})


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_label_scores_and_the_confusion_matrix_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predicted, truth = (np.array(column) for column in zip(*pairs, strict=True))
    logits, names = np.eye(5)[predicted], tuple("abcde")
    found = label_scores(SINGLE, logits, truth, names)
    expected = precision_recall_fscore_support(truth, predicted, labels=range(5), zero_division=0)
    assert [score.label for score in found] == list(names)
    for place, name in enumerate(("precision", "recall", "f1", "support")):
        assert [getattr(score, name) for score in found] == pytest.approx(expected[place].tolist())
    matrix = confusion_matrix(logits, truth)
    assert matrix.tolist() == sklearn_matrix(truth, predicted, labels=range(5)).tolist()


def test_label_scores_of_several_labels_a_row_and_of_a_regression() -> None:
    logits = np.array([[2.0, -1.0], [-3.0, -1.0], [1.0, 1.0]])
    truth = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert label_scores(MULTI, logits, truth, ("x", "y")) == (
        LabelScore("x", 1 / 2, 1 / 2, 1 / 2, 2),
        LabelScore("y", 0.0, 0.0, 0.0, 0),
    )
    assert label_scores(REGRESSION, np.zeros((2, 1)), np.zeros(2), ("stars",)) == ()
