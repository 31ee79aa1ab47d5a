"""SQuAD's exact match and F1 of extracted answers (Rajpurkar et al. 2016, 2018; the official evaluate-v2.0.py).

Both sides are lower-cased, punctuation, the articles a, an, the and surplus spaces go, and a question counts with
its best answer. Chinese and Japanese have no spaces: there each character is a token of the F1, and their
punctuation goes too, as CMRC 2018 evaluates. A text without their characters scores as in the official script.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han
_TOKENS = re.compile(f"[{_IDEOGRAPHS}]|[^\\s{_IDEOGRAPHS}]+")
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_OF_CHINESE = re.compile(  # and Japanese
    "[\u3001-\u3003\u3008-\u3011\u3014-\u301f\u30fb"  # punctuation, brackets, the middle dot
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # full-width and half-width forms
    "\u2018\u2019\u201c\u201d\u2014\u2026\u00b7]"  # quotes, dash, ellipsis, dot
)
_HAS_IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")


def normalize(text: str) -> str:
    """The form in which answers are compared."""
    bare = _PUNCTUATION.sub("", text.lower())
    if _HAS_IDEOGRAPH.search(bare):
        bare = _OF_CHINESE.sub("", bare)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction is one of the answers, else 0.0. Without answers the empty prediction is right."""
    found = normalize(prediction)
    return float(any(found == answer for answer in _wanted(answers)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of tokens that prediction and answer have in common; of two empty ones 1.0."""
    found = _TOKENS.findall(normalize(prediction))
    return max(_overlap(found, _TOKENS.findall(answer)) for answer in _wanted(answers))


def score_spans(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of `exact_match` and `f1` over all questions, of which there is one at least.

    Where some questions have no answer and others have, also `answerable_exact_match`, `answerable_f1` and
    `unanswerable_accuracy`, the share of unanswerable questions with an empty prediction.
    """
    pairs = list(zip(predictions, answers, strict=True))
    scores = [(exact_match(*pair), f1(*pair)) for pair in pairs]
    found = {"exact_match": _mean([em for em, _ in scores]), "f1": _mean([overlap for _, overlap in scores])}
    answerable = [score for score, (_, wanted) in zip(scores, pairs, strict=True) if wanted]
    if 0 < len(answerable) < len(pairs):
        found["answerable_exact_match"] = _mean([em for em, _ in answerable])
        found["answerable_f1"] = _mean([overlap for _, overlap in answerable])
        unanswerable = [em for (em, _), (_, wanted) in zip(scores, pairs, strict=True) if not wanted]
        found["unanswerable_accuracy"] = _mean(unanswerable)
    return found


def _wanted(answers: Sequence[str]) -> list[str]:
    """Normalised answers; those of punctuation and articles alone do not count, as in the official script."""
    return [bare for answer in answers if (bare := normalize(answer))] or [""]


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
