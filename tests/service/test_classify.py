"""Classify, as a client sees it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest
from grpc import aio

from server.pb.multilora.v1 import inference_pb2
from tests.service.fake_runtime import DIGEST
from tests.service.harness import Harness, classify_request, failure_of


async def test_every_label_is_scored_best_first(server: Harness) -> None:
    reply = await server.inference.Classify(classify_request("topics", "the match was lost", "a new chip"))

    assert reply.adapter == "tenants/default/adapters/topics/versions/1"
    assert (reply.version, reply.digest) == (1, DIGEST)
    assert [result.num_tokens for result in reply.results] == [6, 5]
    for result in reply.results:
        scores = [entry.score for entry in result.scores]
        assert sorted(entry.label for entry in result.scores) == ["art", "law", "sport", "tech"]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)
        assert not result.truncated
        assert not result.logits
    assert not reply.labels


async def test_equal_scores_keep_the_order_of_the_labels(server: Harness) -> None:
    reply = await server.inference.Classify(classify_request("topics", ""))
    assert [entry.label for entry in reply.results[0].scores] == ["art", "law", "sport", "tech"]


async def test_top_k_returns_the_best_labels_only(server: Harness) -> None:
    full = await server.inference.Classify(classify_request("topics", "one two"))
    best = await server.inference.Classify(classify_request("topics", "one two", top_k=2))
    many = await server.inference.Classify(classify_request("topics", "one two", top_k=99))
    assert list(best.results[0].scores) == list(full.results[0].scores)[:2]
    assert many.results == full.results


async def test_logits_come_in_the_order_of_the_labels(server: Harness) -> None:
    request = classify_request("topics", "one two", return_logits=True, top_k=1)
    reply = await server.inference.Classify(request)
    result = reply.results[0]
    best = max(range(4), key=lambda index: result.logits[index])
    assert list(reply.labels) == ["art", "law", "sport", "tech"]
    assert result.scores[0].label == reply.labels[best]


async def test_a_text_pair_is_one_input(server: Harness) -> None:
    pair = inference_pb2.TextInput(text="one two", text_pair="three")
    reply = await server.inference.Classify(inference_pb2.ClassifyRequest(adapter="spam", inputs=[pair]))
    assert [result.num_tokens for result in reply.results] == [5]


async def test_timings_cover_every_stage(server: Harness) -> None:
    timings = (await server.inference.Classify(classify_request("spam", "one"))).timings
    assert timings.queue_seconds == pytest.approx(0.001)
    assert timings.forward_seconds == pytest.approx(0.002)
    assert 0 < timings.tokenize_seconds < timings.total_seconds


@pytest.mark.parametrize(
    "reference",
    ["spam", "spam@1", "tenants/default/adapters/spam", "tenants/default/adapters/spam/versions/1"],
)
async def test_an_adapter_has_several_spellings(server: Harness, reference: str) -> None:
    reply = await server.inference.Classify(classify_request(reference, "one"))
    assert reply.adapter == "tenants/default/adapters/spam/versions/1"


async def test_a_long_text_is_refused_with_its_index(server: Harness) -> None:
    failure = await failure_of(server.inference.Classify(classify_request("short", "one", "1 2 3 4 5")))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.field == "inputs[1].text"
    assert failure.info.reason == "TEXT_TOO_LONG"
    assert failure.info.metadata["limit"] == "6"


async def test_a_long_text_is_cut_when_asked(server: Harness) -> None:
    request = classify_request("short", "one", "1 2 3 4 5", truncate=True)
    results = (await server.inference.Classify(request)).results
    assert [(result.num_tokens, result.truncated) for result in results] == [(3, False), (6, True)]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (classify_request("", "one"), "adapter"),
        (classify_request("spam@1x", "one"), "adapter"),
        (classify_request("spam@0", "one"), "adapter"),
        (classify_request("spam@", "one"), "adapter"),
        (classify_request("../spam", "one"), "adapter"),
        (classify_request("x" * 5000, "one"), "adapter"),
        (classify_request("spam"), "inputs"),
        (classify_request("spam", *["one"] * 9), "inputs"),
        (classify_request("spam", "one", top_k=0), "top_k"),
        (classify_request("spam", "one", top_k=-3), "top_k"),
    ],
)
async def test_a_wrong_field_is_named(server: Harness, request_: Any, field: str) -> None:
    failure = await failure_of(server.inference.Classify(request_))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.field == field
    assert failure.info.domain == "multilora"


@pytest.mark.parametrize("reference", ["absent", "spam@7", "tenants/other/adapters/spam"])
async def test_an_unknown_adapter_is_not_found(server: Harness, reference: str) -> None:
    failure = await failure_of(server.inference.Classify(classify_request(reference, "one")))
    assert failure.code is grpc.StatusCode.NOT_FOUND
    assert failure.info.reason == "ADAPTER_NOT_FOUND"
    assert "spam" in failure.message or "absent" in failure.message


@pytest.mark.parametrize(("adapter", "why"), [("garbled", "not valid JSON"), ("nan", "has a NaN")])
async def test_a_refused_adapter_says_why(server: Harness, adapter: str, why: str) -> None:
    await failure_of(server.inference.Classify(classify_request(adapter, "one")))
    failure = await failure_of(server.inference.Classify(classify_request(adapter, "one")))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.info.reason == "ADAPTER_FAILED"
    assert why in failure.message


async def test_the_unexpected_leaks_nothing(server: Harness, caplog: pytest.LogCaptureFixture) -> None:
    def explode(_: object) -> Any:
        raise ZeroDivisionError("secret detail")

    server.engine.answer = explode
    with caplog.at_level(logging.ERROR):
        failure = await failure_of(server.inference.Classify(classify_request("spam", "private words")))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.message
    assert failure.info.metadata == {"request_id": failure.request_id}
    assert failure.request_id in caplog.text
    assert "secret detail" in caplog.text
    assert "private words" not in caplog.text


async def test_the_callers_request_id_comes_back(server: Harness) -> None:
    metadata = (("x-request-id", "abc-123"),)
    call = server.inference.Classify(classify_request("spam", "one"), metadata=metadata)
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "abc-123"
    failure = await failure_of(server.inference.Classify(classify_request("absent", "one"), metadata=metadata))
    assert failure.request_id == "abc-123"


async def test_a_request_id_is_made_when_the_caller_sends_none(server: Harness) -> None:
    calls = [server.inference.Classify(classify_request("spam", "one")) for _ in range(2)]
    await asyncio.gather(*calls)
    first, second = [dict(await call.trailing_metadata())["x-request-id"] for call in calls]
    assert first != second


async def test_overload_is_refused_at_once_with_a_hint(server: Harness) -> None:
    server.engine.gate.clear()
    waiting = server.inference.Classify(classify_request("spam", *["one"] * 6))
    await server.until_admitted(6)
    failure = await failure_of(server.inference.Classify(classify_request("spam", *["one"] * 3)))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.info.reason == "CAPACITY_EXCEEDED"
    assert failure.retry_after_s is not None
    assert failure.retry_after_s > 0

    server.engine.gate.set()
    assert len((await waiting).results) == 6
    assert len((await server.inference.Classify(classify_request("spam", *["one"] * 8))).results) == 8


async def test_a_cancelled_call_gives_its_permits_back(server: Harness) -> None:
    server.engine.gate.clear()
    waiting = server.inference.Classify(classify_request("spam", *["one"] * 6))
    await server.until_admitted(6)
    waiting.cancel()
    await server.until_admitted(0)
    server.engine.gate.set()
    await server.inference.Classify(classify_request("spam", *["one"] * 8))
    assert server.engine.seen[0].request_id in server.engine.cancelled


async def test_an_expired_deadline_gives_its_permits_back(server: Harness) -> None:
    server.engine.gate.clear()
    with pytest.raises(aio.AioRpcError) as caught:
        await server.inference.Classify(classify_request("spam", *["one"] * 6), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await server.until_admitted(0)
    server.engine.gate.set()
    await server.inference.Classify(classify_request("spam", *["one"] * 8))
    assert server.engine.seen[0].deadline_monotonic is not None


async def test_every_failed_call_gives_its_permits_back(server: Harness) -> None:
    for adapter, texts in (("short", ["1 2 3 4 5 6"] * 8), ("nan", ["one"] * 8), ("garbled", ["one"] * 8)):
        for _ in range(3):
            failure = await failure_of(server.inference.Classify(classify_request(adapter, *texts)))
            assert failure.code is not grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await server.sample("multilora_admitted_sequences") == 0


async def test_a_request_larger_than_the_limit_is_refused(server: Harness) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await server.inference.Classify(classify_request("spam", "x" * (17 << 20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
