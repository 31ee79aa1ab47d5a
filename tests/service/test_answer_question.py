"""AnswerQuestion, as a client sees it.

The fake scores a token as start and as end with `sum of its characters % 10 - 2`: `c` (7) is the best answer of the
letters, `e` (-1) and `d` (-2) are worse than "no answer" (0). A window has room for 12 tokens beside a question of
one token, and shares one with its neighbour.
"""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from lora_runtime.errors import AnswerNotFinite
from lora_runtime.types import Request, Result
from tests.service.harness import Harness, classify_request, failure_of, question_request

QUESTION = "a"


def context(num_words: int, answer_at: int) -> str:
    """`d d ... c ... d`: one answer among words that are none."""
    return " ".join("c" if i == answer_at else "d" for i in range(num_words))


async def test_the_best_span_of_each_context_is_the_answer(tasks: Harness) -> None:
    pairs = [(QUESTION, "d c d"), (QUESTION, "b d d")]
    reply = await tasks.inference.AnswerQuestion(question_request("reader", *pairs))
    first, second = (result.answers for result in reply.results)
    assert [(answer.text, answer.start, answer.end, answer.no_answer) for answer in first] == [("c", 2, 3, False)]
    assert [(answer.text, answer.start, answer.end) for answer in second] == [("b", 0, 1)]
    assert first[0].logit == pytest.approx(14)
    assert 0 < first[0].score <= 1
    assert [(result.num_tokens, result.num_windows) for result in reply.results] == [(7, 1), (7, 1)]


async def test_as_many_answers_as_asked_for_come_best_first(tasks: Harness) -> None:
    request = question_request("reader", (QUESTION, "d c b d"), top_k=3, max_answer_tokens=1)
    (result,) = (await tasks.inference.AnswerQuestion(request)).results
    assert [answer.text for answer in result.answers][:2] == ["c", "b"]
    scores = [answer.score for answer in result.answers]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


async def test_no_answer_is_longer_than_asked_for(tasks: Harness) -> None:
    for limit in (1, 2):
        request = question_request("reader", (QUESTION, "c b c b"), top_k=100, max_answer_tokens=limit)
        (result,) = (await tasks.inference.AnswerQuestion(request)).results
        assert {len(answer.text.split()) for answer in result.answers} <= set(range(1, limit + 1))


@pytest.mark.parametrize("text", ["😀 c", "é c", "e\u0301 c", "日本 c", "\U0001f468\u200d\U0001f469 c"])
async def test_offsets_count_code_points_of_the_context_as_sent(tasks: Harness, text: str) -> None:
    request = question_request("reader", ("😀", text), max_answer_tokens=1, top_k=9)
    (result,) = (await tasks.inference.AnswerQuestion(request)).results
    for answer in result.answers:
        assert answer.text == text[answer.start : answer.end]
    assert ("c", len(text)) in {(answer.text, answer.end) for answer in result.answers}


async def test_no_answer_is_said_unmistakably_and_only_when_allowed(tasks: Harness) -> None:
    pair = (QUESTION, "d e d")
    (plain,) = (await tasks.inference.AnswerQuestion(question_request("reader", pair))).results
    assert [(answer.text, answer.no_answer) for answer in plain.answers] == [("e", False)]

    request = question_request("reader", pair, allow_no_answer=True)
    (result,) = (await tasks.inference.AnswerQuestion(request)).results
    (answer,) = result.answers
    assert (answer.no_answer, answer.text, answer.start, answer.end) == (True, "", 0, 0)
    assert answer.logit == pytest.approx(0)
    assert 0 < answer.score <= 1


async def test_a_good_answer_beats_no_answer(tasks: Harness) -> None:
    request = question_request("reader", (QUESTION, "d c d"), allow_no_answer=True)
    (result,) = (await tasks.inference.AnswerQuestion(request)).results
    assert [(answer.text, answer.no_answer) for answer in result.answers] == [("c", False)]


@pytest.mark.parametrize(("threshold", "no_answer"), [(1.5, True), (2.5, False), (-20.0, True)])
async def test_the_threshold_decides_how_sure_no_answer_must_be(
    tasks: Harness, threshold: float, no_answer: bool
) -> None:
    """The best span, `e`, has -2: no answer is 2 better."""
    request = question_request("reader", (QUESTION, "d e"), allow_no_answer=True, no_answer_threshold=threshold)
    (result,) = (await tasks.inference.AnswerQuestion(request)).results
    assert result.answers[0].no_answer is no_answer


@pytest.mark.parametrize("answer_at", [0, 11, 12, 25, 39])
async def test_a_long_context_is_read_in_windows(tasks: Harness, answer_at: int) -> None:
    text = context(40, answer_at)
    short = "d c"
    request = question_request("reader", (QUESTION, text), (QUESTION, short))
    results = (await tasks.inference.AnswerQuestion(request)).results
    assert [result.num_windows for result in results] == [4, 1]
    (answer,) = results[0].answers
    assert (answer.text, answer.start) == ("c", 2 * answer_at)
    assert results[0].num_tokens == 3 * 16 + 4 + 7
    assert results[1].answers[0].start == 2
    assert len(tasks.engine.seen[0].sequences) == 5


async def test_windows_share_as_many_tokens_as_asked_for(tasks: Harness) -> None:
    request = question_request("reader", (QUESTION, context(40, 3)), doc_stride=6)
    (result,) = (await tasks.inference.AnswerQuestion(request)).results
    assert result.num_windows == 6


async def test_every_window_holds_a_permit_until_the_answer_is_there(tasks: Harness) -> None:
    tasks.engine.gate.clear()
    waiting = tasks.inference.AnswerQuestion(question_request("reader", (QUESTION, context(40, 3)), (QUESTION, "d")))
    await tasks.until_admitted(5)
    tasks.engine.gate.set()
    await waiting
    await tasks.until_admitted(0)


async def test_a_call_cancelled_with_its_windows_gives_every_permit_back(tasks: Harness) -> None:
    tasks.engine.gate.clear()
    waiting = tasks.inference.AnswerQuestion(question_request("reader", (QUESTION, context(40, 3))))
    await tasks.until_admitted(4)
    waiting.cancel()
    await tasks.until_admitted(0)
    tasks.engine.gate.set()


async def test_windows_that_do_not_fit_are_refused_with_a_hint_and_hold_nothing(tasks: Harness) -> None:
    tasks.engine.gate.clear()
    waiting = tasks.inference.Classify(classify_request("spam", *["one"] * 6))
    await tasks.until_admitted(6)
    request = question_request("reader", (QUESTION, context(40, 3)))
    for _ in range(3):
        failure = await failure_of(tasks.inference.AnswerQuestion(request))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.info.reason == "CAPACITY_EXCEEDED"
        assert failure.retry_after_s is not None
        assert failure.retry_after_s > 0
        await tasks.until_admitted(6)
    tasks.engine.gate.set()
    await waiting
    await tasks.until_admitted(0)
    assert (await tasks.inference.AnswerQuestion(request)).results[0].num_windows == 4


async def test_more_windows_than_the_server_ever_holds_are_a_wrong_request(tasks: Harness) -> None:
    """Trying again would not help, so nothing invites to it."""
    request = question_request("reader", *[(QUESTION, context(40, 3))] * 3)
    failure = await failure_of(tasks.inference.AnswerQuestion(request))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs")
    assert failure.retry_after_s is None
    assert "12 sequences" in failure.message
    await tasks.until_admitted(0)


async def test_a_weight_that_overflows_names_the_question_not_the_window(tasks: Harness) -> None:
    def overflow(request: Request) -> Result:
        raise AnswerNotFinite(str(request.adapter), request.input_index(3))

    tasks.engine.answer = overflow
    request = question_request("reader", (QUESTION, "d"), (QUESTION, context(40, 3)))
    failure = await failure_of(tasks.inference.AnswerQuestion(request))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "inputs[1]" in failure.message
    assert failure.info.metadata["index"] == "1"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 101}, "top_k"),
        ({"max_answer_tokens": 0}, "max_answer_tokens"),
        ({"max_answer_tokens": 513}, "max_answer_tokens"),
        ({"doc_stride": -1}, "doc_stride"),
        ({"no_answer_threshold": math.nan, "allow_no_answer": True}, "no_answer_threshold"),
        ({"no_answer_threshold": math.inf, "allow_no_answer": True}, "no_answer_threshold"),
        ({"no_answer_threshold": 1.0}, "no_answer_threshold"),
    ],
)
async def test_a_wrong_field_is_named(tasks: Harness, fields: dict[str, Any], field: str) -> None:
    failure = await failure_of(tasks.inference.AnswerQuestion(question_request("reader", (QUESTION, "c"), **fields)))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("text", ["", "  ", "d " * 1000])
async def test_a_context_that_cannot_be_read_is_named_with_its_index(tasks: Harness, text: str) -> None:
    request = question_request("reader", (QUESTION, "c"), (QUESTION, text))
    failure = await failure_of(tasks.inference.AnswerQuestion(request))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs[1].context")
    await tasks.until_admitted(0)


async def test_no_answer_is_refused_where_no_token_can_stand_for_it(
    tasks: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rpc.answer_question.supports_no_answer", lambda _: False)
    request = question_request("reader", (QUESTION, "c"), allow_no_answer=True)
    failure = await failure_of(tasks.inference.AnswerQuestion(request))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "allow_no_answer")
    request.allow_no_answer = False
    assert (await tasks.inference.AnswerQuestion(request)).results[0].answers[0].text == "c"
