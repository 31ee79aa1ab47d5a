"""What every RPC of InferenceService owes its caller, whatever its task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from grpc import aio

from lora_runtime.types import Request, Result
from server.pb.multilora.v1 import inference_pb2
from tests.service.fake_runtime import DIGEST
from tests.service.harness import (
    Harness,
    classify_request,
    embed_request,
    failure_of,
    generate_request,
    question_request,
    tokens_request,
    translate_request,
)


@dataclass(frozen=True)
class Rpc:
    """One RPC of a server, with an adapter that can answer it and requests of any length."""

    method: str
    adapter: str
    build: Callable[..., Any]
    item: Any = "c d"

    def request(self, num_inputs: int = 1, adapter: str | None = None) -> Any:
        return self.build(self.adapter if adapter is None else adapter, *[self.item] * num_inputs)

    def call(self, server: Harness, *args: Any, timeout: float | None = None, **fields: Any) -> Any:
        return getattr(server.inference, self.method)(self.request(*args, **fields), timeout=timeout)


RPCS = (
    Rpc("Classify", "spam", classify_request),
    Rpc("ClassifyTokens", "people", tokens_request),
    Rpc("AnswerQuestion", "reader", question_request, ("a", "c d")),
    Rpc("Embed", "vectors", embed_request),
    Rpc("Generate", "writer", generate_request),
    Rpc("Translate", "writer", translate_request),
)
ONE_PASS = RPCS[:4]  # what one forward pass answers
every_rpc = pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.method)


@every_rpc
async def test_a_reply_says_who_answered_and_where_the_time_went(tasks: Harness, rpc: Rpc) -> None:
    reply = await rpc.call(tasks, 3)
    assert len(reply.results) == 3
    assert reply.adapter == f"tenants/default/adapters/{rpc.adapter}/versions/1"
    assert (reply.version, reply.digest) == (1, DIGEST)
    timings = reply.timings
    assert (timings.queue_seconds, timings.forward_seconds) == pytest.approx((0.001, 0.002))
    assert timings.tokenize_seconds > 0
    assert timings.interpret_seconds > 0
    assert timings.total_seconds > timings.tokenize_seconds + timings.interpret_seconds
    for stage in ("tokenize", "queue", "load_wait", "forward", "interpret"):
        assert await tasks.sample(f'multilora_stage_seconds_count{{stage="{stage}"}}') == 1


@pytest.mark.parametrize("rpc", ONE_PASS, ids=lambda rpc: rpc.method)
async def test_texts_and_outputs_are_handled_in_tokeniser_threads(tasks: Harness, rpc: Rpc) -> None:
    assert tasks.runtime is not None
    readers: set[str] = set()

    class Watched(tuple[Any, ...]):
        def __iter__(self) -> Iterator[Any]:
            readers.add(threading.current_thread().name)
            return super().__iter__()

    answer = tasks.engine.answer
    tasks.engine.answer = lambda request: _with_outputs(answer(request), Watched)
    await rpc.call(tasks)
    assert readers
    for names in (readers, tasks.runtime.encoder_threads):
        assert all(name.startswith("tokenize") for name in names)


def _with_outputs(result: Result, kind: Callable[[Any], Any]) -> Result:
    return replace(result, outputs=kind(result.outputs))


@every_rpc
async def test_an_adapter_of_another_task_is_refused_before_any_text_is_read(tasks: Harness, rpc: Rpc) -> None:
    assert tasks.runtime is not None
    others = {other.adapter for other in RPCS} - {rpc.adapter} | ({"base"} if rpc.method != "Embed" else set())
    for adapter in others - ({"writer"} if rpc.method == "AnswerQuestion" else set()):  # which may write answers
        failure = await failure_of(rpc.call(tasks, adapter=adapter))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert failure.info.reason == "TASK_MISMATCH"
        assert adapter in failure.message
    assert not tasks.runtime.encoder_threads
    assert not tasks.engine.seen


@every_rpc
async def test_an_unknown_adapter_is_not_found(tasks: Harness, rpc: Rpc) -> None:
    for reference in ("absent", f"{rpc.adapter}@9", f"tenants/other/adapters/{rpc.adapter}"):
        failure = await failure_of(rpc.call(tasks, adapter=reference))
        assert failure.code is grpc.StatusCode.NOT_FOUND


@every_rpc
@pytest.mark.parametrize("reference", ["", "a b", "spam@0"])
async def test_a_wrong_reference_is_named(tasks: Harness, rpc: Rpc, reference: str) -> None:
    failure = await failure_of(rpc.call(tasks, adapter=reference))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "adapter")


@every_rpc
@pytest.mark.parametrize("num_inputs", [0, 9])
async def test_no_inputs_and_too_many_are_refused(tasks: Harness, rpc: Rpc, num_inputs: int) -> None:
    failure = await failure_of(rpc.call(tasks, num_inputs))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs")


@every_rpc
async def test_overload_is_refused_with_a_hint(tasks: Harness, rpc: Rpc) -> None:
    tasks.engine.gate.clear()
    waiting = rpc.call(tasks, 6)
    await tasks.until_admitted(6)
    failure = await failure_of(rpc.call(tasks, 3))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.retry_after_s is not None
    tasks.engine.gate.set()
    assert len((await waiting).results) == 6
    await tasks.until_admitted(0)


@every_rpc
async def test_a_call_cancelled_in_the_queue_gives_its_permits_back(tasks: Harness, rpc: Rpc) -> None:
    tasks.engine.gate.clear()
    waiting = rpc.call(tasks, 6)
    await tasks.until_admitted(6)
    async with asyncio.timeout(5):
        while not tasks.engine.submitted:
            await asyncio.sleep(0.01)
    waiting.cancel()
    await tasks.until_admitted(0)
    tasks.engine.gate.set()
    assert len((await rpc.call(tasks, 8)).results) == 8
    assert tasks.engine.seen[0].request_id in tasks.engine.cancelled


@every_rpc
async def test_a_call_cancelled_while_it_is_tokenised_never_reaches_the_engine(tasks: Harness, rpc: Rpc) -> None:
    assert tasks.runtime is not None
    tasks.runtime.tokenizer_gate.clear()
    waiting = rpc.call(tasks, 6)
    await tasks.until_admitted(6)
    waiting.cancel()
    await tasks.until_admitted(0)
    tasks.runtime.tokenizer_gate.set()
    assert len((await rpc.call(tasks, 8)).results) == 8
    assert len(tasks.engine.seen) == 1


@every_rpc
async def test_a_call_cancelled_while_its_answer_is_read_gives_its_permits_back(tasks: Harness, rpc: Rpc) -> None:
    reading, go_on = threading.Event(), threading.Event()

    class Slow(tuple[Any, ...]):
        def __iter__(self) -> Iterator[Any]:
            reading.set()
            go_on.wait(2)
            return super().__iter__()

    answer = tasks.engine.answer
    tasks.engine.answer = lambda request: _with_outputs(answer(request), Slow)
    waiting = rpc.call(tasks, 6)
    assert await asyncio.to_thread(reading.wait, 5)
    waiting.cancel()
    await tasks.until_admitted(0)
    go_on.set()
    tasks.engine.answer = answer
    assert len((await rpc.call(tasks, 8)).results) == 8


@every_rpc
async def test_an_expired_deadline_gives_its_permits_back(tasks: Harness, rpc: Rpc) -> None:
    tasks.engine.gate.clear()
    with pytest.raises(aio.AioRpcError) as caught:
        await rpc.call(tasks, 6, timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await tasks.until_admitted(0)
    tasks.engine.gate.set()
    assert len((await rpc.call(tasks, 8)).results) == 8


@every_rpc
async def test_outputs_that_cannot_be_read_fail_the_call_and_give_its_permits_back(
    tasks: Harness, rpc: Rpc, caplog: pytest.LogCaptureFixture
) -> None:
    answer = tasks.engine.answer

    def one_too_few(request: Request) -> Result:
        result = answer(request)
        return replace(result, outputs=result.outputs[:-1])

    tasks.engine.answer = one_too_few
    failure = await failure_of(rpc.call(tasks, 2))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert failure.request_id in caplog.text
    await tasks.until_admitted(0)


@every_rpc
async def test_an_error_of_the_engine_gives_the_permits_back(
    tasks: Harness, rpc: Rpc, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(_: Request) -> Result:
        raise ZeroDivisionError("secret detail")

    tasks.engine.answer = explode
    failure = await failure_of(rpc.call(tasks, 2))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.message
    assert "secret detail" in caplog.text
    await tasks.until_admitted(0)


@pytest.mark.parametrize("rpc", [RPCS[0], RPCS[1], RPCS[3]], ids=lambda rpc: rpc.method)
async def test_a_long_text_is_refused_with_its_index_or_cut_when_asked(tasks: Harness, rpc: Rpc) -> None:
    request = rpc.build(rpc.adapter, "c", " ".join(["c"] * 20))
    failure = await failure_of(getattr(tasks.inference, rpc.method)(request))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs[1].text")
    assert failure.info.reason == "TEXT_TOO_LONG"
    await tasks.until_admitted(0)
    request.truncate = True
    results = (await getattr(tasks.inference, rpc.method)(request)).results
    assert [(result.num_tokens, result.truncated) for result in results] == [(3, False), (16, True)]


async def test_requests_of_every_task_are_answered_side_by_side(tasks: Harness) -> None:
    first, second = [await asyncio.gather(*(rpc.call(tasks) for rpc in RPCS)) for _ in range(2)]
    assert [type(reply) for reply in first] == [getattr(inference_pb2, f"{rpc.method}Response") for rpc in RPCS]
    assert [reply.results for reply in first] == [reply.results for reply in second]


@every_rpc
async def test_a_text_of_too_many_characters_is_refused_before_it_is_tokenised(tasks: Harness, rpc: Rpc) -> None:
    long = "x" * 262_145
    item = long if isinstance(rpc.item, str) else (rpc.item[0], long)
    failure = await failure_of(getattr(tasks.inference, rpc.method)(rpc.build(rpc.adapter, rpc.item, item)))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.field in ("inputs[1].text", "inputs[1].context")
    assert "262144" in failure.message
    assert await tasks.sample("multilora_admitted_sequences") == 0


@every_rpc
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["no message", "no UTF-8"])
async def test_bytes_that_are_no_message_are_an_error_with_a_reason(tasks: Harness, rpc: Rpc, data: bytes) -> None:
    method = f"/multilora.v1.InferenceService/{rpc.method}"
    failure = await failure_of(tasks.channel.unary_unary(method)(data))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.info.reason == "INVALID_REQUEST"
    series = f'multilora_requests_total{{code="INVALID_ARGUMENT",method="multilora.v1.InferenceService/{rpc.method}"}}'
    await tasks.until_sample(series, 1.0)
