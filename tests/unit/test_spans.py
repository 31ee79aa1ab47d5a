"""Answers in a context from the logits of its windows."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest

from lora_runtime.answers.spans import Span, best_spans, supports_no_answer
from lora_runtime.model.encoder_text import Window
from lora_runtime.types import SpanLogits, TokenSequence
from tests.text_encoders import make_encoder


def window(*places: tuple[int, int] | None, null_index: int | None = 0) -> Window:
    return Window(TokenSequence(tuple(range(len(places))), None), places, null_index)


def logits(num_tokens: int, start: Mapping[int, float], end: Mapping[int, float], rest: float = -9.0) -> SpanLogits:
    return SpanLogits(*(tuple(float(side.get(k, rest)) for k in range(num_tokens)) for side in (start, end)))


def answers(
    windows: list[Window],
    rows: list[SpanLogits],
    *,
    top_k: int = 3,
    max_answer_tokens: int = 30,
    allow_no_answer: bool = False,
    no_answer_threshold: float = 0.0,
) -> tuple[Span, ...]:
    return best_spans(
        windows, rows, top_k=top_k, max_answer_tokens=max_answer_tokens, allow_no_answer=allow_no_answer,
        no_answer_threshold=no_answer_threshold,
    )  # fmt: skip


def places(spans: tuple[Span, ...]) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in spans]


FOUR = window(None, None, (0, 3), (4, 8), (9, 12), (13, 20), None)  # CLS, question, four words, SEP


def test_the_best_span_runs_from_its_first_tokens_start_to_its_last_tokens_end() -> None:
    best = answers([FOUR], [logits(7, {3: 4.0}, {4: 5.0})])[0]
    assert (best.start, best.end, best.logit, best.is_null) == (4, 12, 9.0, False)


def test_only_context_forward_and_short_spans_are_answers() -> None:
    row = logits(7, {1: 50.0, 0: 50.0, 5: 8.0, 2: 7.0}, {1: 50.0, 6: 50.0, 2: 6.0, 5: 5.0})
    found = answers([FOUR], [row], top_k=2, max_answer_tokens=3)
    assert [(span.start, span.end, span.logit) for span in found] == [(0, 3, 13.0), (13, 20, 13.0)]
    assert (0, 20) in places(answers([FOUR], [row], top_k=3, max_answer_tokens=4))


def test_scores_are_a_softmax_of_the_candidates() -> None:
    one = window(None, (0, 3), (4, 8))
    row = SpanLogits((0.0, 1.0, 0.5), (0.0, 0.25, 2.0))
    found = answers([one], [row], top_k=9)
    sums = {(0, 8): 3.0, (4, 8): 2.5, (0, 3): 1.25}
    total = sum(math.exp(value) for value in sums.values())
    assert {(span.start, span.end): span.score for span in found} == pytest.approx(
        {place: math.exp(value) / total for place, value in sums.items()}
    )
    assert answers([one], [row], top_k=1) == found[:1]
    with_null = answers([one], [row], top_k=9, allow_no_answer=True)
    assert sum(span.score for span in with_null) == pytest.approx(1.0)
    assert [span.score for span in with_null if span.is_null] == pytest.approx([1 / (total + 1)])


def test_a_span_in_two_windows_is_one_candidate_with_the_better_logit() -> None:
    first, second = window(None, (0, 3), (4, 8)), window(None, (4, 8), (9, 12))
    rows = [logits(3, {2: 2.0}, {2: 2.0}), logits(3, {1: 3.0}, {1: 2.5})]
    found = answers([first, second], rows, top_k=20)
    assert (found[0].start, found[0].end, found[0].logit) == (4, 8, 5.5)
    assert len(set(places(found))) == len(found) == 5


def test_tokens_inside_one_character_give_one_candidate() -> None:
    emoji = window((0, 1), (2, 3), (2, 3), (2, 3), null_index=None)
    found = answers([emoji], [SpanLogits((0.0, 1.0, 3.0, 0.0), (0.0, 4.0, 1.0, 2.0))], top_k=20)
    assert [(span.start, span.end, span.logit) for span in found] == [(2, 3, 5.0), (0, 3, 4.0), (0, 1, 0.0)]


def test_equal_logits_give_the_earlier_then_the_shorter_span() -> None:
    found = answers([FOUR], [SpanLogits((0.0,) * 7, (0.0,) * 7)], top_k=5)
    assert places(found) == [(0, 3), (0, 8), (0, 12), (0, 20), (4, 8)]


@pytest.mark.parametrize(("threshold", "null_first"), [(0.0, True), (0.9, True), (1.0, False), (5.0, False)])
def test_no_answer_comes_first_when_it_beats_the_best_span_by_the_threshold(threshold: float, null_first: bool) -> None:
    row = logits(7, {0: 3.0, 3: 2.0, 4: 1.0}, {0: 2.0, 4: 2.0})  # null 5, best 4
    found = answers([FOUR], [row], allow_no_answer=True, no_answer_threshold=threshold)
    assert [span.is_null for span in found] == [null_first, not null_first, False]
    null = next(span for span in found if span.is_null)
    assert (null.start, null.end, null.logit) == (0, 0, 5.0)


def test_a_negative_threshold_prefers_no_answer() -> None:
    row = logits(7, {0: 1.0, 3: 2.0}, {0: 2.0, 4: 2.0})
    assert not answers([FOUR], [row], allow_no_answer=True)[0].is_null
    assert answers([FOUR], [row], allow_no_answer=True, no_answer_threshold=-2.0)[0].is_null


def test_the_window_least_sure_of_no_answer_decides() -> None:
    rows = [logits(7, {0: 9.0}, {0: 9.0}), logits(7, {0: -1.0, 3: 1.0}, {0: -1.0, 3: 1.0})]
    found = answers([FOUR, FOUR], rows, allow_no_answer=True)
    assert (found[0].start, found[0].end) == (4, 8)
    assert next(span for span in found if span.is_null).logit == -2.0


def test_no_answer_is_left_out_where_it_is_not_allowed() -> None:
    row = logits(7, {0: 90.0}, {0: 90.0})
    assert not any(span.is_null for span in answers([FOUR], [row], top_k=50))


def test_no_answer_needs_a_token_for_it_in_every_window() -> None:
    assert supports_no_answer([FOUR, FOUR])
    assert not supports_no_answer([FOUR, window((0, 3), null_index=None)])


def test_there_is_an_answer_even_where_the_best_starts_come_after_the_best_ends() -> None:
    n = 60
    places_of = [(2 * k, 2 * k + 1) for k in range(n)]
    start, end = {k: float(k) for k in range(40, n)}, {k: float(n - k) for k in range(20)}
    found = answers([window(*places_of, null_index=None)], [logits(n, start, end, rest=-50.0)])
    assert found[0].end > found[0].start


def test_white_space_may_start_an_answer_but_not_end_it() -> None:
    spaced = window((0, 1), (3, 3), (3, 7), null_index=None)
    found = answers([spaced], [SpanLogits((0.0, 9.0, 0.0), (0.0, 9.0, 1.0))], top_k=1)
    assert places(found) == [(3, 7)]
    assert answers([window((1, 1), null_index=None)], [SpanLogits((0.0,), (0.0,))]) == ()


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_an_answer_is_cut_out_of_the_context_character_for_character(family: str) -> None:
    context = "Prices:\r\n€ 5 for 😀👍🏽 (zero\u200bwidth) in 北京是首都, cafe\u0301 e\u0301te\u0301."
    encoder = make_encoder(family)
    for gold in ("€ 5", "😀👍🏽", "zero\u200bwidth", "北京", "首都", "cafe\u0301 e\u0301te\u0301"):
        (windows,) = encoder.encode_questions([("What?", context)], max_length=None)
        begin = context.index(gold)
        rows = [
            SpanLogits(
                tuple(8.0 if place and place[0] <= begin < place[1] else 0.0 for place in row.offsets),
                tuple(8.0 if place and place[0] < begin + len(gold) <= place[1] else 0.0 for place in row.offsets),
            )
            for row in windows
        ]
        best = answers(list(windows), rows, top_k=1, max_answer_tokens=100)[0]
        assert context[best.start : best.end] == gold


def test_the_windows_of_a_long_context_take_milliseconds() -> None:
    rng = np.random.default_rng(0)
    firsts = [5 * 384 * k for k in range(64)]
    windows = [window(None, *((first + 5 * k, first + 5 * k + 4) for k in range(511))) for first in firsts]
    rows = [SpanLogits(tuple(rng.normal(size=512).tolist()), tuple(rng.normal(size=512).tolist())) for _ in windows]
    seconds: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        answers(windows, rows, top_k=5, allow_no_answer=True)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.25  # a busy machine's share; alone it is a twentieth


def test_many_windows_in_which_no_best_start_meets_a_best_end_stay_cheap() -> None:
    """A badly trained adapter's, for which all pairs are tried: 8 million in all, of which few are kept."""
    up = tuple(float(k) for k in range(512))
    windows = [window(None, *((5 * k, 5 * k + 4) for k in range(511))) for _ in range(64)]
    rows = [SpanLogits(up, up[::-1]) for _ in windows]
    tracemalloc.start()
    try:
        found = answers(windows, rows, top_k=5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 5
    assert peak < 64 << 20
