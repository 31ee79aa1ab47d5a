"""Spans against trying every pair; windows and offsets of any text against the text itself."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.answers.spans import best_spans
from lora_runtime.errors import InvalidRequest
from lora_runtime.model.encoder_text import MIN_CONTEXT_TOKENS, Window
from lora_runtime.types import SpanLogits, TokenSequence
from tests.text_encoders import FAMILIES, make_encoder

MAX_TOKENS = 9
Place = tuple[int, int] | None
Kept = dict[tuple[int, int], float]

# What tokenizers stumble over: joined emoji, marks, line ends, characters without width, Chinese, right to left.
PIECES = st.one_of(
    st.sampled_from(
        ["a", "B", "Leo", " ", "  ", "\r\n", "\t", ".", "-", "'s", "é", "e\u0301", "\u0301", "ß", "İ", "ﬁ"]
    ),
    st.sampled_from(["\u200b", "\ufeff", "\u00ad", "\x00", "\ufffd", "<s>", "[SEP]", "##a", "▁"]),
    st.sampled_from(["😀", "👩\u200d👧", "👍🏽", "🇩🇪", "𝒳", "北", "京", "，", "한", "हि", "ש"]),
)
TEXTS = st.lists(PIECES, max_size=40).map("".join)


@st.composite
def _windows(draw: st.DrawFn) -> tuple[list[Window], list[SpanLogits]]:
    """Pieces of one context with few distinct logits, so that many spans are equal and many are in two windows."""
    lengths = draw(st.lists(st.integers(0, 2), min_size=1, max_size=MAX_TOKENS))
    context, position = [], 0
    for length in lengths:
        context.append((position, position + length))
        position += length if draw(st.booleans()) else length + 1
    values = st.integers(-3, 3).map(float)
    windows, rows = [], []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(context) - 1))
        stop = draw(st.integers(start + 1, len(context)))
        places: tuple[Place, ...] = (None, None, *context[start:stop], None)
        windows.append(Window(TokenSequence(tuple(range(len(places))), None), places, draw(st.integers(0, 1))))
        row = st.lists(values, min_size=len(places), max_size=len(places)).map(tuple)
        rows.append(SpanLogits(draw(row), draw(row)))
    return windows, rows


def _every_span(windows: list[Window], rows: list[SpanLogits], max_answer_tokens: int) -> Kept:
    """The best logit of each pair of code points that a start and an end token span."""
    spans: Kept = {}
    for window, row in zip(windows, rows, strict=True):
        for i, first in enumerate(window.offsets):
            for j, last in enumerate(window.offsets[i : i + max_answer_tokens], i):
                if first is not None and last is not None and last[0] < last[1]:
                    place = first[0], last[1]
                    spans[place] = max(spans.get(place, -math.inf), row.start[i] + row.end[j])
    return spans


@given(_windows(), st.integers(1, 30), st.integers(1, MAX_TOKENS))
def test_spans_are_the_best_of_all_pairs(
    drawn: tuple[list[Window], list[SpanLogits]], top_k: int, max_answer_tokens: int
) -> None:
    windows, rows = drawn
    spans = _every_span(windows, rows, max_answer_tokens)
    expected = sorted(spans, key=lambda place: (-spans[place], place))
    found = best_spans(windows, rows, top_k=top_k, max_answer_tokens=max_answer_tokens, allow_no_answer=False)
    assert [(span.start, span.end) for span in found] == expected[:top_k]
    assert [span.logit for span in found] == [spans[place] for place in expected[:top_k]]
    total = sum(math.exp(spans[place]) for place in expected[: max(top_k, 20)])
    assert [span.score for span in found] == pytest.approx([math.exp(span.logit) / total for span in found])


@given(_windows(), st.integers(1, 30), st.integers(-7, 7).map(float))
def test_no_answer_takes_its_place_by_the_threshold(
    drawn: tuple[list[Window], list[SpanLogits]], top_k: int, threshold: float
) -> None:
    windows, rows = drawn
    spans = _every_span(windows, rows, MAX_TOKENS)
    null = min(row.start[w.null_index or 0] + row.end[w.null_index or 0] for w, row in zip(windows, rows, strict=True))
    found = best_spans(
        windows, rows, top_k=99, max_answer_tokens=MAX_TOKENS, allow_no_answer=True, no_answer_threshold=threshold
    )
    cut = best_spans(
        windows, rows, top_k=top_k, max_answer_tokens=MAX_TOKENS, allow_no_answer=True, no_answer_threshold=threshold
    )
    assert [span.logit for span in cut] == [span.logit for span in found[:top_k]]
    assert [span.logit for span in found if span.is_null] == [null]
    assert found[0].is_null == (not spans or null - max(spans.values()) > threshold)
    assert sum(span.score for span in found) == pytest.approx(1.0)
    rest = [span.logit for span in found[1:]]
    assert rest == sorted(rest, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS)
def test_offsets_of_any_text_are_in_order_and_cover_what_the_tokenizer_keeps(family: str, text: str) -> None:
    (tokenised,) = make_encoder(family, max_length=10_000).encode_tokens([text], max_length=None, truncate=False)
    places = [place for place in tokenised.offsets if place is not None]
    words = [word for word in tokenised.word_ids if word is not None]
    assert len(places) == len(words)
    assert all(0 <= start <= end <= len(text) for start, end in places)
    assert [start for start, _ in places] == sorted(start for start, _ in places)
    assert [end for _, end in places] == sorted(end for _, end in places)
    assert all(text[start:end] == text[start:end].strip() for start, end in places)
    assert words == sorted(words) and set(words) == set(range(len(set(words))))
    if family != "bert":  # which drops control characters and marks
        covered = {k for start, end in places for k in range(start, end)}
        assert covered >= {k for k, character in enumerate(text) if not character.isspace()}


@pytest.mark.parametrize("family", FAMILIES)
@given(context=TEXTS, room=st.integers(MIN_CONTEXT_TOKENS, 40), stride=st.none() | st.integers(0, 30))
def test_every_token_of_any_context_is_in_a_window(family: str, context: str, room: int, stride: int | None) -> None:
    encoder, question = make_encoder(family, max_length=10_000), "Who?"
    try:
        ((whole,),) = encoder.encode_questions([(question, context)], max_length=None)
    except InvalidRequest:  # no text
        tokens_alone = encoder.encode_tokens([context], max_length=None, truncate=False)[0]
        assert not context.strip() or set(tokens_alone.offsets) <= {None}
        return
    around = sum(place is None for place in whole.offsets)
    (windows,) = encoder.encode_questions([(question, context)], max_length=around + room, doc_stride=stride)
    tokens = list(zip(whole.sequence.input_ids, whole.offsets, strict=True))
    first = next(k for k, (_, place) in enumerate(tokens) if place is not None)
    inner = tokens[first : first + len(tokens) - around]
    begin = 0
    for window in windows:
        assert window.sequence.num_tokens <= around + room
        pairs = list(zip(window.sequence.input_ids, window.offsets, strict=True))
        own = pairs[first : first + len(pairs) - around]
        assert pairs[:first] == tokens[:first] and pairs[first + len(own) :] == tokens[first + len(inner) :]
        overlap = min(room // 4 if stride is None else stride, room // 2) if begin else 0
        begin -= overlap
        assert own == inner[begin : begin + len(own)]
        begin += len(own)
    assert begin == len(inner)
