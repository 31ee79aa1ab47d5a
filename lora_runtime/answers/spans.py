"""Start and end logits of a context's windows to its best answers, with their place in the context.

The practice of SQuAD v2 (Rajpurkar et al. 2018; transformers' question-answering example): a span's logit is the sum
of its first token's start logit and its last token's end logit; that of "no answer" is the sum at the CLS token, the
lowest over windows, since a window without the answer is sure that there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_runtime.types import SpanLogits

if TYPE_CHECKING:  # brings transformers
    from lora_runtime.model.encoder_text import Window

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

MIN_CANDIDATES = 20  # starts and ends tried per window, and spans that share the scores


@dataclass(frozen=True, slots=True)
class Span:
    """`context[start:end]`, in code points; start and end are 0 when this is "no answer"."""

    start: int
    end: int
    logit: float  # start logit plus end logit
    score: float  # softmax of the logits of the candidates, "no answer" included where it is allowed
    is_null: bool


def supports_no_answer(windows: Sequence[Window]) -> bool:
    """Whether the tokenizer adds a token where "no answer" can be scored."""
    return all(window.null_index is not None for window in windows)


def best_spans(
    windows: Sequence[Window],
    logits: Sequence[SpanLogits],
    *,
    top_k: int,
    max_answer_tokens: int,
    allow_no_answer: bool,
    no_answer_threshold: float = 0.0,
) -> tuple[Span, ...]:
    """At most `top_k` spans of one context, best first; ties go to the earlier, then to the shorter.

    A span found in several windows counts once, with its better logit. "No answer" is first when its logit exceeds
    that of the best span by more than `no_answer_threshold`, else anywhere after. Empty only when no window has a
    token of the context that shows a character, and "no answer" is not allowed.

    `allow_no_answer` needs windows that `supports_no_answer`.
    """
    num_candidates = max(MIN_CANDIDATES, top_k)
    starts, ends, sums = _candidates(windows, logits, num_candidates, max_answer_tokens)
    order = _best_distinct(starts, ends, sums, num_candidates)
    found = [(int(starts[k]), int(ends[k]), float(sums[k]), False) for k in order]
    if allow_no_answer:
        null = _null_logit(windows, logits)
        rank = sum(logit >= null for _, _, logit, _ in found)
        if found:
            rank = 0 if null - found[0][2] > no_answer_threshold else max(rank, 1)
        found.insert(rank, (0, 0, null, True))
    scores = _softmax([logit for _, _, logit, _ in found])
    spans = (
        Span(start, end, logit, score, null) for (start, end, logit, null), score in zip(found, scores, strict=True)
    )
    return tuple(spans)[:top_k]


def _candidates(
    windows: Sequence[Window], logits: Sequence[SpanLogits], num_candidates: int, max_answer_tokens: int
) -> tuple[Ints, Ints, Floats]:
    """Spans of all windows: first code point, one past the last, logit.

    Where the best starts and ends of no window fit together (every start after every end), all of them are tried.
    """
    for limit in (num_candidates, max(len(window.offsets) for window in windows)):
        parts: list[tuple[Ints, Ints, Floats]] = []
        for window, row in zip(windows, logits, strict=True):
            spans = _in_window(window, row, limit, max_answer_tokens)
            kept = _best_distinct(*spans, num_candidates)  # of all pairs there may be millions
            parts.append((spans[0][kept], spans[1][kept], spans[2][kept]))
        starts, ends, sums = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(sums):
            break
    return starts, ends, sums


def _in_window(window: Window, logits: SpanLogits, limit: int, max_answer_tokens: int) -> tuple[Ints, Ints, Floats]:
    """Pairs of the `limit` best starts and ends. Tokens of white space alone may start an answer, not end it."""
    places = np.array([place or (0, 0) for place in window.offsets], np.int64)  # [n, 2]
    is_context = np.array([place is not None for place in window.offsets])
    start, end = np.array(logits.start, np.float64), np.array(logits.end, np.float64)  # [n]
    firsts = _best(start, is_context, limit)[:, None]
    lasts = _best(end, is_context & (places[:, 0] < places[:, 1]), limit)[None, :]
    fits = (lasts >= firsts) & (lasts < firsts + max_answer_tokens)
    first, last = (index[fits] for index in np.broadcast_arrays(firsts, lasts))
    return places[first, 0], places[last, 1], start[first] + end[last]


def _best(logits: Floats, allowed: np.ndarray[Any, np.dtype[np.bool_]], limit: int) -> Ints:
    """Indices of the `limit` highest among the allowed, the earlier of equals first."""
    indices = np.flatnonzero(allowed)
    return indices[np.argsort(-logits[indices], kind="stable")[:limit]]


def _best_distinct(starts: Ints, ends: Ints, sums: Floats, count: int) -> Ints:
    """Indices of the `count` best spans, each once, the best first; no more are sorted than it takes."""
    num_sorted = 4 * count
    while True:
        every = num_sorted >= len(sums)
        near = np.arange(len(sums)) if every else np.flatnonzero(sums >= np.partition(sums, -num_sorted)[-num_sorted])
        order = near[_distinct_best_first(starts[near], ends[near], sums[near])]
        if every or len(order) >= count:
            return order[:count]
        num_sorted *= 8


def _distinct_best_first(starts: Ints, ends: Ints, sums: Floats) -> Ints:
    """Indices of the best of each span, the best span first."""
    order = np.lexsort((ends, starts, -sums))
    spans = starts[order] * (int(ends.max(initial=0)) + 1) + ends[order]
    _, first = np.unique(spans, return_index=True)
    return order[np.sort(first)]


def _null_logit(windows: Sequence[Window], logits: Sequence[SpanLogits]) -> float:
    sums: list[float] = []
    for window, row in zip(windows, logits, strict=True):
        assert window.null_index is not None, "the caller checks supports_no_answer"
        sums.append(row.start[window.null_index] + row.end[window.null_index])
    return min(sums)


def _softmax(logits: Sequence[float]) -> list[float]:
    if not logits:
        return []
    powers = np.exp(np.array(logits) - max(logits))
    return (powers / powers.sum()).tolist()
