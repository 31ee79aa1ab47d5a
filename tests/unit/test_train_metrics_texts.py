"""BLEU, chrF, perplexity, and metrics of embeddings, against sacreBLEU, scipy and plain loops."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lora_runtime.train.metrics.embeddings import score_pairs, score_scored_pairs, score_triplets, spearman
from lora_runtime.train.metrics.texts import bleu_tokenizer, perplexity, score_texts

CHINESE = ["我买了很多笔记本。", "我需要去医院，现在就去。", "他问了我 Tom 一个问题。"]
ENGLISH = ["I bought many notebooks.", "I need to go to the hospital, now.", "He asked me a question about it."]
JAPANESE = ["私はノートをたくさん買いました。", "病院に行かなければならない。"]


@pytest.mark.parametrize(
    ("references", "tokenizer"), [(CHINESE, "zh"), (ENGLISH, "13a"), (JAPANESE, "char"), ([""], "13a")]
)
def test_the_tokenizer_follows_the_references(references: list[str], tokenizer: str) -> None:
    assert bleu_tokenizer(references) == tokenizer


@pytest.mark.parametrize(("references", "tokenizer"), [(CHINESE, "zh"), (ENGLISH, "13a")])
def test_texts_score_as_sacrebleu_scores_them(references: list[str], tokenizer: str) -> None:
    predictions = [text[:-3] + text[-1] for text in references]
    bleu = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score
    found = score_texts(predictions, references)
    assert found == pytest.approx({"bleu": bleu, "chrf": sacrebleu.corpus_chrf(predictions, [references]).score})
    assert 20 < bleu < 100
    other = sacrebleu.corpus_bleu(predictions, [references], tokenize="char").score
    assert score_texts(predictions, references, "char")["bleu"] == pytest.approx(other)
    assert other != pytest.approx(bleu)


def test_the_same_texts_score_a_hundred_and_none_scores_nothing() -> None:
    assert score_texts(CHINESE, CHINESE) == pytest.approx({"bleu": 100, "chrf": 100})
    assert score_texts([""] * 3, CHINESE) == {"bleu": 0, "chrf": 0}


def test_perplexity_of_even_odds_is_their_number() -> None:
    assert perplexity(12 * math.log(50), 12) == pytest.approx(50)
    assert perplexity(1e6, 1) == math.inf


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_is_that_of_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    if len(set(first)) > 1 and len(set(second)) > 1:
        assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    else:
        assert spearman(first, second) == 0.0


def test_scored_pairs_are_ranked_by_their_cosines_not_by_their_lengths() -> None:
    angles = np.array([0.1, 0.9, 0.5, 1.4])
    first = np.tile([[1.0, 0.0]], (4, 1))
    second = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1.0], [50.0], [9.0], [99.0]]
    assert score_scored_pairs(first, second, -angles) == {"spearman": pytest.approx(1.0)}


def test_retrieval_looks_for_the_closest_of_all_positives() -> None:
    draw = np.random.default_rng(0)
    queries = draw.normal(size=(2500, 8))  # more than one block
    positives = queries + draw.normal(scale=0.7, size=queries.shape)
    similar = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (positives.T / np.linalg.norm(positives, axis=1))
    expected = float((similar.argmax(axis=1) == np.arange(len(queries))).mean())
    assert 0.1 < expected < 0.9
    assert score_pairs(queries, positives) == {"retrieval_accuracy": pytest.approx(expected)}


def test_an_equal_positive_text_of_another_row_is_right() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    positives = np.array([[1.0, 0.001], [1.0, 0.0], [1.0, 0.0]])
    assert score_pairs(queries, positives, ["a", "b", "b"])["retrieval_accuracy"] == pytest.approx(0 / 3)
    assert score_pairs(queries, positives, ["a", "a", "a"])["retrieval_accuracy"] == pytest.approx(1.0)
    assert score_pairs(queries, positives, ["b", "a", "b"])["retrieval_accuracy"] == pytest.approx(2 / 3)


def test_triplets_are_right_where_the_positive_is_closer() -> None:
    anchors = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    close, far = np.array([[9.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 0.9]])
    assert score_triplets(anchors, close, far)["triplet_accuracy"] == pytest.approx(1 / 3)


def test_rows_and_metrics_load_neither_torch_nor_other_heavy_libraries() -> None:
    modules = (
        *(f"rows.{name}" for name in ("answer", "classify", "embed", "prompt", "tokens")),
        *(f"metrics.{name}" for name in ("classes", "embeddings", "spans", "tags", "texts")),
    )
    heavy = {"torch", "transformers", "datasets", "pyarrow", "sacrebleu", "matplotlib", "sklearn"}
    program = "; ".join(f"import lora_runtime.train.{module}" for module in modules)
    program += f"; import sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
