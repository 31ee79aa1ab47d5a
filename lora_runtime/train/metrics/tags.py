"""Scores of entities found in sentences, as CoNLL's evaluation and seqeval's default mode count them.

An entity is right when its kind and both its ends are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from lora_runtime.answers.tags import EntitySpan, entity_spans
from lora_runtime.train.metrics.classes import LabelScore

Sentences = Sequence[Sequence[str]]  # the tags of each sentence's words


def score_tags(predicted: Sentences, truth: Sentences, labels: Collection[str]) -> dict[str, float]:
    """`f1`, `precision` and `recall` over all entities, and the `accuracy` of single tags.

    `labels` are all that the head has: they tell a scheme's prefix from a name such as `E-mail`. Both sides have the
    same sentences with the same words.
    """
    right, found, wanted = _counts(predicted, truth, labels)
    total = LabelScore.of("", right.total(), found.total(), wanted.total())
    tags = [pair for sides in zip(predicted, truth, strict=True) for pair in zip(*sides, strict=True)]
    accuracy = sum(a == b for a, b in tags) / len(tags) if tags else 0.0
    return {"f1": total.f1, "precision": total.precision, "recall": total.recall, "accuracy": accuracy}


def entity_scores(predicted: Sentences, truth: Sentences, labels: Collection[str]) -> tuple[LabelScore, ...]:
    """The scores of each kind of entity that is true or predicted, sorted by name."""
    right, found, wanted = _counts(predicted, truth, labels)
    return tuple(LabelScore.of(kind, right[kind], found[kind], wanted[kind]) for kind in sorted({*found, *wanted}))


def _counts(
    predicted: Sentences, truth: Sentences, labels: Collection[str]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By kind: entities that are right, that were predicted, and that are true."""
    right: Counter[str] = Counter()
    found: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for mine, theirs in zip(predicted, truth, strict=True):
        answered, expected = (set[EntitySpan](entity_spans(tags, labels)) for tags in (mine, theirs))
        found.update(span.kind for span in answered)
        wanted.update(span.kind for span in expected)
        right.update(span.kind for span in answered & expected)
    return right, found, wanted
