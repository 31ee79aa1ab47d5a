"""Metrics of embeddings, by the cosine of two vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_runtime.train.metrics.classes import Array

_BLOCK = 1024  # rows compared with all at once, so that memory stays at N times this


def score_scored_pairs(first: Array, second: Array, scores: Array) -> dict[str, float]:
    """`spearman`: the rank correlation of the pairs' cosines with their scores. Vectors are [N, d], scores [N]."""
    return {"spearman": spearman((_unit(first) * _unit(second)).sum(axis=1), scores)}


def score_pairs(queries: Array, positives: Array, texts: Sequence[str] | None = None) -> dict[str, float]:
    """`retrieval_accuracy`: how often, of all positives, a query's own is the closest (accuracy at 1).

    Vectors are [N, d]. `texts` are the positives' texts: another row's equal text is right too. Without them a tie is
    right when the own positive is among the closest.
    """
    queries, positives = _unit(queries), _unit(positives)
    number = {text: index for index, text in enumerate(texts or ())}
    kinds = np.arange(len(positives)) if texts is None else np.array([number[text] for text in texts])
    right = 0
    for start in range(0, len(queries), _BLOCK):
        similar = queries[start : start + _BLOCK] @ positives.T  # [block, N]
        own = kinds[start : start + _BLOCK, None] == kinds
        right += int((np.where(own, similar, -np.inf).max(axis=1) >= similar.max(axis=1)).sum())
    return {"retrieval_accuracy": right / len(queries)}


def score_triplets(anchors: Array, positives: Array, negatives: Array) -> dict[str, float]:
    """`triplet_accuracy`: how often the positive is closer than the negative. Vectors are [N, d]."""
    anchors = _unit(anchors)
    close, far = ((anchors * _unit(others)).sum(axis=1) for others in (positives, negatives))
    return {"triplet_accuracy": float((close > far).mean())}


def spearman(first: Array, second: Array) -> float:
    """Spearman's rank correlation of two [N]; equal values share their mean rank. 0.0 where one side is constant."""
    a, b = _centred_ranks(first), _centred_ranks(second)
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else 0.0


def _centred_ranks(values: Array) -> Array:
    _, kinds, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the highest rank of each distinct value, from 1
    ranks = (last - (counts - 1) / 2)[kinds]
    return ranks - ranks.mean()


def _unit(vectors: Array) -> Array:
    """float64 rows of length 1; a row of zeros stays as it is."""
    vectors = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)
