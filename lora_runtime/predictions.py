"""Texts as the library takes them, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import Classification, Result


@dataclass(frozen=True, slots=True)
class Prediction:
    """One text's answer."""

    label: str  # the best one; of a regression, its only one
    score: float
    scores: dict[str, float]  # in the adapter's label order


def text_pairs(texts: Sequence[object]) -> list[tuple[str, str | None]]:
    if isinstance(texts, str):
        raise InvalidRequest("texts", "is one string; pass a list of texts")
    pairs: list[tuple[str, str | None]] = []
    for i, item in enumerate(texts):
        match item:
            case str():
                pairs.append((item, None))
            case (str() as text, str() as pair):
                pairs.append((text, pair))
            case _:
                raise InvalidRequest(f"texts[{i}]", f"is a {type(item).__name__}; a text or a (text, pair) is needed")
    return pairs


def single_texts(texts: Sequence[object]) -> list[str]:
    pairs = text_pairs(texts)
    for i, (_, pair) in enumerate(pairs):
        if pair is not None:
            raise InvalidRequest(f"texts[{i}]", "is a pair; one text is needed")
    return [text for text, _ in pairs]


def labels_of(result: Result) -> tuple[str, ...]:
    assert result.card.labels is not None, "loaded weights have labels"
    return result.card.labels


def prediction_of(output: Classification, labels: tuple[str, ...]) -> Prediction:
    best = max(range(len(labels)), key=lambda i: output.scores[i])
    return Prediction(labels[best], output.scores[best], dict(zip(labels, output.scores, strict=True)))
