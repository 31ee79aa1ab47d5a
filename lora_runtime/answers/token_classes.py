"""Logits of tokens to labels of tokens, words or entities, with their place in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_runtime.answers.tags import entity_spans
from lora_runtime.types import TokenClassification

if TYPE_CHECKING:  # brings transformers
    from lora_runtime.model.encoder_text import TokenText

Scores = np.ndarray[Any, np.dtype[np.float64]]


class TokenUnit(StrEnum):
    """What gets a label."""

    TOKENS = "tokens"  # every token of the text, special ones not
    WORDS = "words"
    ENTITIES = "entities"  # words of one entity together


class SubwordStrategy(StrEnum):
    """How the scores of a word's tokens become those of the word."""

    FIRST = "first"  # those of its first token, as most are trained
    AVERAGE = "average"
    MAX = "max"  # those of the token that is surest of a label


@dataclass(frozen=True, slots=True)
class TokenLabel:
    """A label of `text[start:end]`, in code points."""

    start: int
    end: int
    label: str  # of an entity without the prefix of its scheme
    score: float  # of the label; of an entity, the mean over its words
    scores: tuple[float, ...]  # of all labels, in the adapter's order; of an entity, the mean over its words


class _Piece(NamedTuple):
    """A token or word with its scores, softmax over labels."""

    start: int
    end: int
    scores: Scores  # [num_labels]


def label_tokens(
    text: TokenText,
    output: TokenClassification,
    labels: Sequence[str],
    *,
    unit: TokenUnit,
    strategy: SubwordStrategy,
) -> tuple[TokenLabel, ...]:
    """The labels of a text in its order. `strategy` is of words and entities.

    Words of nothing but white space get no label, nor does what is labelled "O" when entities are asked for.
    """
    scores = _softmax(np.asarray(output.logits, np.float64))  # [n, num_labels]
    if unit is TokenUnit.TOKENS:
        placed = zip(text.offsets, scores, strict=True)
        return tuple(_label(_Piece(*place, row), labels) for place, row in placed if place is not None)
    words = _words(text, scores, strategy)
    if unit is TokenUnit.WORDS:
        return tuple(_label(word, labels) for word in words)
    return _entities(words, labels)


def _softmax(logits: Scores) -> Scores:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _label(piece: _Piece, labels: Sequence[str]) -> TokenLabel:
    best = int(piece.scores.argmax())
    return TokenLabel(piece.start, piece.end, labels[best], float(piece.scores[best]), tuple(piece.scores.tolist()))


def _words(text: TokenText, scores: Scores, strategy: SubwordStrategy) -> list[_Piece]:
    tokens: dict[int, list[int]] = {}
    for k, word in enumerate(text.word_ids):
        if word is not None:
            tokens.setdefault(word, []).append(k)
    words: list[_Piece] = []
    for members in tokens.values():
        places = [place for k in members if (place := text.offsets[k]) is not None and place[0] < place[1]]
        if places:
            word_scores = _combine(scores[members], strategy)
            words.append(_Piece(places[0][0], max(end for _, end in places), word_scores))
    return words


def _combine(scores: Scores, strategy: SubwordStrategy) -> Scores:
    """[tokens of a word, num_labels] → [num_labels]."""
    if strategy is SubwordStrategy.FIRST:
        return scores[0]
    if strategy is SubwordStrategy.AVERAGE:
        return scores.mean(0)
    return scores[scores.max(-1).argmax()]


def _entities(words: list[_Piece], labels: Sequence[str]) -> tuple[TokenLabel, ...]:
    best = [labels[int(word.scores.argmax())] for word in words]
    return tuple(_merge(span.kind, words[span.first : span.end]) for span in entity_spans(best, frozenset(labels)))


def _merge(kind: str, words: list[_Piece]) -> TokenLabel:
    scores = np.stack([word.scores for word in words])  # [words, num_labels]
    score = float(scores.max(-1).mean())
    return TokenLabel(words[0].start, words[-1].end, kind, score, tuple(scores.mean(0).tolist()))
