"""ClassifyTokens, as a client sees it. The fake gives a token the label `sum of its characters % 3`."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from server.pb.multilora.v1 import inference_pb2 as pb
from tests.service.harness import Harness, failure_of, tokens_request

O, BEGIN, INSIDE = "c", "a", "b"  # noqa: E741 - words whose labels are O, B-PER and I-PER


def seen(result: pb.ClassifyTokensResult) -> list[tuple[str, str]]:
    return [(span.text, span.label) for span in result.spans]


async def test_words_are_labelled_in_order_of_the_text(tasks: Harness) -> None:
    reply = await tasks.inference.ClassifyTokens(tokens_request("people", f"{O} {BEGIN}  {INSIDE}", BEGIN))
    assert [seen(result) for result in reply.results] == [
        [("c", "O"), ("a", "B-PER"), ("b", "I-PER")],
        [("a", "B-PER")],
    ]
    assert [(span.start, span.end) for span in reply.results[0].spans] == [(0, 1), (2, 3), (5, 6)]
    assert [result.num_tokens for result in reply.results] == [5, 3]
    assert list(reply.labels) == ["O", "B-PER", "I-PER"]
    for span in reply.results[0].spans:
        assert 0.9 < span.score < 1
        assert not span.scores


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (pb.TOKEN_UNIT_UNSPECIFIED, [("a_c", "B-PER"), ("b", "I-PER"), ("c", "O")]),
        (pb.TOKEN_UNIT_WORDS, [("a_c", "B-PER"), ("b", "I-PER"), ("c", "O")]),
        (pb.TOKEN_UNIT_TOKENS, [("a", "B-PER"), ("_c", "O"), ("b", "I-PER"), ("c", "O")]),
        (pb.TOKEN_UNIT_ENTITIES, [("a_c b", "PER")]),
    ],
)
async def test_labels_are_given_to_the_unit_that_was_asked_for(
    tasks: Harness, unit: pb.TokenUnit.ValueType, expected: list[tuple[str, str]]
) -> None:
    reply = await tasks.inference.ClassifyTokens(tokens_request("people", "a_c b c", unit=unit))
    assert seen(reply.results[0]) == expected


async def test_a_word_of_several_tokens_is_labelled_as_asked(tasks: Harness) -> None:
    scores: dict[int, list[float]] = {}
    for strategy in pb.SubwordStrategy.values():
        request = tokens_request("people", "c_a_a", subword_strategy=strategy, return_scores=True)
        (span,) = (await tasks.inference.ClassifyTokens(request)).results[0].spans
        scores[strategy] = list(span.scores)
        assert span.label == ("B-PER" if strategy == pb.SUBWORD_STRATEGY_AVERAGE else "O")
    assert scores[pb.SUBWORD_STRATEGY_UNSPECIFIED] == scores[pb.SUBWORD_STRATEGY_FIRST]
    one, other = max(scores[pb.SUBWORD_STRATEGY_FIRST]), min(scores[pb.SUBWORD_STRATEGY_FIRST])
    average = scores[pb.SUBWORD_STRATEGY_AVERAGE]
    assert average[:2] == pytest.approx([(one + 2 * other) / 3, (other + 2 * one) / 3])


async def test_every_labels_score_comes_when_asked(tasks: Harness) -> None:
    request = tokens_request("people", "c a", return_scores=True)
    reply = await tasks.inference.ClassifyTokens(request)
    for span in reply.results[0].spans:
        assert sum(span.scores) == pytest.approx(1)
        assert span.scores[list(reply.labels).index(span.label)] == pytest.approx(span.score)


@pytest.mark.parametrize("text", ["😀 a", "née a", "e\u0301 a", "日本 a", "\u200d a"])
async def test_offsets_count_code_points_of_the_text_as_sent(tasks: Harness, text: str) -> None:
    reply = await tasks.inference.ClassifyTokens(tokens_request("people", text))
    last = reply.results[0].spans[-1]
    assert (last.text, text[last.start : last.end], last.end) == ("a", "a", len(text))
    for span in reply.results[0].spans:
        assert span.text == text[span.start : span.end]


@pytest.mark.parametrize("text", ["", "   ", "\n"])
async def test_a_text_without_words_has_no_spans(tasks: Harness, text: str) -> None:
    reply = await tasks.inference.ClassifyTokens(tokens_request("people", text, "a"))
    assert [len(result.spans) for result in reply.results] == [0, 1]
    assert reply.results[0].num_tokens == 2


async def test_what_is_cut_off_gets_no_labels(tasks: Harness) -> None:
    text = " ".join(["a"] * 20)
    reply = await tasks.inference.ClassifyTokens(tokens_request("people", text, truncate=True))
    (result,) = reply.results
    assert (len(result.spans), result.num_tokens, result.truncated) == (14, 16, True)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (tokens_request("people", "a", unit=9), "unit"),
        (tokens_request("people", "a", subword_strategy=9), "subword_strategy"),
        (
            pb.ClassifyTokensRequest(adapter="people", inputs=[pb.TextInput(text="a"), pb.TextInput(text_pair="b")]),
            "inputs[1].text_pair",
        ),
    ],
)
async def test_a_wrong_field_is_named(tasks: Harness, request_: Any, field: str) -> None:
    failure = await failure_of(tasks.inference.ClassifyTokens(request_))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    await tasks.until_admitted(0)
