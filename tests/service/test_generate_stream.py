"""GenerateStream: what comes when, and what ends it. The fake repeats its prompt: see `fake_generation`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from lora_runtime.errors import AdapterNotFound, AnswerNotFinite, RequestCancelled
from lora_runtime.generation import Delta, Generated, Sample
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.types import Request, Result, Task, Timings
from server.pb.multilora.v1 import inference_pb2 as pb
from server.pb.multilora.v1 import inference_pb2_grpc
from server.tenancy.model import Role
from tests.service.fake_generation import LOGPROB
from tests.service.fake_runtime import DIGEST, write_adapter
from tests.service.harness import Harness, failure_of, generate_request, running
from tests.service.tenants import guarded, make_door

FINISHED = 'multilora_finished_samples_total{{finish_reason="{}"}}'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapters" / "plain", task="generate")
    return tmp_path / "adapters"


@pytest.fixture
async def server(root: Path) -> AsyncGenerator[Harness]:
    async with running(root, max_queued_sequences=256) as harness:
        yield harness


def texts_of(messages: list[pb.GenerateStreamResponse], num_samples: int = 1) -> list[str]:
    """What each sample's deltas join to."""
    deltas = [message.delta for message in messages if message.WhichOneof("part") == "delta"]
    return ["".join(delta.text for delta in deltas if delta.sample == k) for k in range(num_samples)]


async def first_of(call: Any) -> pb.GenerateStreamResponse:
    async with asyncio.timeout(10):
        return await call.read()


async def until_released(server: Harness) -> None:
    """Wait until nothing is held, here and in the engine."""
    await server.until_admitted(0)
    async with asyncio.timeout(10):
        while server.engine.num_generating:
            await asyncio.sleep(0.005)
    await server.until_sample("multilora_open_streams", 0.0)


@asynccontextmanager
async def held(server: Harness, num_tokens: int = 1, **options: Any) -> AsyncGenerator[Any]:
    """A stream of two samples that each have their first token, and whose engine waits for steps."""
    server.engine.steps = threading.Semaphore(num_tokens)
    request = generate_request("plain", "abcdef", sampling={"n": 2})
    call = server.inference.GenerateStream(request, **options)
    assert {(await first_of(call)).delta.text for _ in range(2)} == {"a", "b"}
    yield call
    server.engine.steps = None
    await until_released(server)


@pytest.mark.parametrize("text", ["abc", "日本語", "😀é\u0301👨‍👩‍👧", "a\nb\x01c\u2028"])
async def test_the_deltas_of_a_sample_join_to_its_text(server: Harness, text: str) -> None:
    request = generate_request("plain", text, sampling={"n": 2})
    messages = [message async for message in server.inference.GenerateStream(request)]
    assert texts_of(messages, 2) == [text, text[1:]]
    assert [message.WhichOneof("part") for message in messages[:-1]] == ["delta"] * (len(messages) - 1)
    end = messages[-1].end
    assert [(sample.finish_reason, sample.num_tokens) for sample in end.samples] == [
        (pb.FINISH_REASON_EOS, len(text) + 1),
        (pb.FINISH_REASON_EOS, len(text)),
    ]
    assert (end.adapter, end.version, end.digest) == ("tenants/default/adapters/plain/versions/1", 1, DIGEST)
    assert (end.usage.prompt_tokens, end.usage.generated_tokens) == (len(text), 2 * len(text) + 1)
    assert 0 < end.timings.first_token_seconds <= end.timings.total_seconds
    await until_released(server)


async def test_text_comes_before_the_end(server: Harness) -> None:
    async with held(server) as call:
        assert server.engine.num_generating == 1
        assert await server.sample("multilora_open_streams") == 1
        assert await server.sample("multilora_admitted_sequences") == 2
        call.cancel()


async def test_stop_texts_are_held_back(server: Harness) -> None:
    request = generate_request("plain", "abcde", sampling={"stop": ["cd"]})
    messages = [message async for message in server.inference.GenerateStream(request)]
    assert texts_of(messages) == ["ab"]
    (sample,) = messages[-1].end.samples
    assert (sample.finish_reason, sample.stop, sample.num_tokens) == (pb.FINISH_REASON_STOP_STRING, "cd", 4)


async def test_tokens_come_with_their_text_when_asked_for(server: Harness) -> None:
    request = generate_request("plain", "ab", sampling={"logprobs": 1})
    deltas = [message.delta async for message in server.inference.GenerateStream(request)]
    tokens = [token for delta in deltas for token in delta.tokens]
    assert [(token.token_id, token.logprob, len(token.top_logprobs)) for token in tokens] == [
        (97, LOGPROB, 1),
        (98, LOGPROB, 1),
        (0, LOGPROB, 1),
    ]
    request = generate_request("plain", "ab")
    assert not any(message.delta.tokens for message in [m async for m in server.inference.GenerateStream(request)])


async def test_a_stream_takes_one_input(server: Harness) -> None:
    for texts in ((), ("a", "b")):
        failure = await failure_of(server.inference.GenerateStream(generate_request("plain", *texts)).read())
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "inputs")


def bursts(texts: list[str]) -> Callable[[Request], Result]:
    """An engine that makes all deltas at once."""

    def answer(request: Request) -> Result:
        generation = request.generation
        assert generation is not None
        assert generation.on_delta is not None
        token = SampledToken(7)
        for text in texts:
            generation.on_delta(Delta(0, 0, text, (token,)))
        sample = Sample("".join(texts), (token,) * len(texts), FinishReason.EOS)
        card: Any = None
        return Result(request.adapter, DIGEST, card, (Generated((sample,)),), Timings(0.0, 0.0, 0.0))

    return answer


async def test_a_reader_that_is_behind_gets_more_at_once(server: Harness) -> None:
    texts = [f"{k} " for k in range(5000)]
    server.engine.answer = bursts(texts)
    call = server.inference.GenerateStream(generate_request("plain", "x"))
    messages = [message async for message in call]
    assert texts_of(messages) == ["".join(texts)]
    assert len(messages) < 2500
    assert messages[-1].end.usage.generated_tokens == 5000


async def test_a_client_that_does_not_read_is_dropped(root: Path) -> None:
    async with running(root, stream_stall_seconds=0.3, max_queued_sequences=256) as server:
        burst = bursts(["x" * 200_000] * 200)  # more than what is buffered on the way

        def endless(request: Request) -> Result:
            burst(request)
            while request.request_id not in server.engine.cancelled:
                time.sleep(0.005)
            raise RequestCancelled("the caller went away")

        server.engine.answer = endless
        call = server.inference.GenerateStream(generate_request("plain", "x"))
        await first_of(call)
        await server.until_sample("multilora_open_streams", 0.0)
        await server.until_admitted(0)
        assert server.engine.cancelled == {server.engine.seen[0].request_id}
        assert await server.sample(FINISHED.format("cancelled")) == 1

        async def read_all() -> None:
            while await call.read() is not aio.EOF:
                pass

        failure = await failure_of(read_all())
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_STALLED")
        assert failure.info.metadata["limit_s"] == "0.3"


async def test_a_slow_model_is_no_stall(root: Path) -> None:
    async with running(root, stream_stall_seconds=0.2) as server:
        server.engine.steps = threading.Semaphore(1)
        call = server.inference.GenerateStream(generate_request("plain", "abc"))
        await first_of(call)
        await asyncio.sleep(0.5)
        server.engine.steps = None
        text = ""
        while not (message := await first_of(call)).HasField("end"):
            text += message.delta.text
        assert text == "bc"


async def test_a_cancel_reaches_the_engine(server: Harness) -> None:
    async with held(server) as call:
        call.cancel()
        async with asyncio.timeout(5):
            while server.engine.num_generating:
                await asyncio.sleep(0.005)
        assert server.engine.cancelled == {server.engine.seen[0].request_id}
    assert await server.sample(FINISHED.format("cancelled")) == 2
    assert await server.sample("multilora_generated_tokens_total") == 2


async def test_a_deadline_ends_the_stream_and_the_work(server: Harness) -> None:
    async with held(server, timeout=1.0) as call:
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until_released(server)
    assert await server.sample(FINISHED.format("deadline")) == 2


async def test_a_client_that_goes_away_ends_the_work(server: Harness) -> None:
    server.engine.steps = threading.Semaphore(1)
    async with aio.insecure_channel(f"127.0.0.1:{server.app.port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        await first_of(stub.GenerateStream(generate_request("plain", "abc")))
    await until_released(server)
    assert server.engine.cancelled == {server.engine.seen[0].request_id}


async def test_a_server_that_stops_ends_streams_after_its_grace(root: Path) -> None:
    async with running(root, grace=0.2) as server:
        server.engine.steps = threading.Semaphore(1)
        call = server.inference.GenerateStream(generate_request("plain", "abc"))
        await first_of(call)
        server.stop.set()
        with pytest.raises(aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        server.engine.steps = None
    assert server.engine.cancelled == {server.engine.seen[0].request_id}


async def test_a_cancel_before_the_first_token_reaches_the_engine(server: Harness) -> None:
    server.engine.gate.clear()
    call = server.inference.GenerateStream(generate_request("plain", "abc"))
    await server.until_admitted(1)
    async with asyncio.timeout(5):
        while not server.engine.submitted:
            await asyncio.sleep(0.005)
    call.cancel()
    await server.until_admitted(0)
    server.engine.gate.set()
    await until_released(server)
    assert server.engine.cancelled == {server.engine.submitted[0].request_id}


async def test_an_error_after_the_first_message_ends_the_stream_with_its_status(server: Harness) -> None:
    async with held(server) as call:
        server.engine.fault = lambda request: AnswerNotFinite(str(request.adapter), 0)
        failure = await failure_of(call.read())
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ANSWER_NOT_FINITE")
        server.engine.fault = lambda _: None
    assert await server.sample(FINISHED.format("error")) == 2


async def test_an_adapter_that_is_deleted_is_looked_up_again_before_the_first_message_alone(server: Harness) -> None:
    faults = [AdapterNotFound("default/plain@1")]
    server.engine.fault = lambda _: faults.pop() if faults else None
    call = server.inference.GenerateStream(generate_request("plain", "abc"))
    assert texts_of([message async for message in call]) == ["abc"]
    assert len(server.engine.seen) == 2
    async with held(server) as call:
        faults.append(AdapterNotFound("default/plain@1"))
        assert (await failure_of(call.read())).code is grpc.StatusCode.NOT_FOUND
    assert len(server.engine.seen) == 3


async def test_streams_of_two_tenants_are_never_mixed(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    for tenant in ("acme", "bolt"):
        write_adapter(root / tenant / "plain" / "1", task="generate")
    door = make_door(tmp_path / "door")
    keys = [("acme", "acme", (Role.INFER,)), ("bolt", "bolt", (Role.INFER,))]
    async with guarded(root, door, keys) as (server, callers):

        async def read(tenant: str, number: int) -> None:
            text = f"{tenant} says {number}"
            request = generate_request("plain", text, sampling={"n": 3, "ignore_eos": True, "max_new_tokens": 40})
            messages = [message async for message in callers[tenant].start("GenerateStream", request)]
            wanted = [((text[k:]) * 40)[:40] for k in range(3)]
            assert texts_of(messages, 3) == wanted
            assert messages[-1].end.adapter == f"tenants/{tenant}/adapters/plain/versions/1"

        await asyncio.gather(*(read(tenant, number) for number in range(20) for tenant in ("acme", "bolt")))
        await until_released(server)
        assert {request.tenant for request in server.engine.seen} == {"acme", "bolt"}
        assert all(request.task is Task.GENERATE for request in server.engine.seen)


async def test_generated_tokens_are_charged_as_they_come_even_of_a_stream_that_is_cancelled(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    write_adapter(root / "acme" / "plain" / "1", task="generate")
    door = make_door(tmp_path / "door", "[tenants.acme]", "tokens_per_minute = 60")
    async with guarded(root, door, [("acme", "acme", (Role.INFER,))]) as (server, callers):
        acme = callers["acme"]
        sampling = {"ignore_eos": True, "max_new_tokens": 60}
        server.engine.steps = threading.Semaphore(57)
        call = acme.start("GenerateStream", generate_request("plain", "ab", sampling=sampling))
        while await server.sample("multilora_generated_tokens_total") < 57:
            await asyncio.sleep(0.005)
        failure = await failure_of(acme("Generate", generate_request("plain", "abcdefghijkl")))  # 3 by estimate
        assert failure.quota == ("tenants/acme", "tokens_per_minute = 60")
        call.cancel()
        await until_released(server)
        failure = await failure_of(acme("Generate", generate_request("plain", "abcdefghijkl")))
        assert failure.quota == ("tenants/acme", "tokens_per_minute = 60")


async def test_nothing_is_held_after_streams_that_ended_in_every_way(server: Harness) -> None:
    server.engine.steps = threading.Semaphore(0)
    calls = [
        server.inference.GenerateStream(
            generate_request("plain", "abcdefgh", sampling={"n": 2}), timeout=2.0 if number % 3 == 0 else None
        )
        for number in range(60)
    ]
    async with asyncio.timeout(30):
        while len(server.engine.submitted) < 60:
            await asyncio.sleep(0.01)
    for number, call in enumerate(calls):
        if number % 15 == 0:
            server.engine.steps.release()
        if number % 3 == 1:
            call.cancel()
        await asyncio.sleep(0.002)

    async def read(call: Any) -> bool:
        try:
            return [message async for message in call][-1].HasField("end")
        except (aio.AioRpcError, asyncio.CancelledError):
            return False

    assert not any(await asyncio.gather(*(read(call) for call in calls[0::3] + calls[1::3])))
    server.engine.steps = None
    assert all(await asyncio.gather(*(read(call) for call in calls[2::3])))
    await until_released(server)
    assert await server.sample(FINISHED.format("eos")) == 40
    assert await server.sample(FINISHED.format("cancelled")) + await server.sample(FINISHED.format("deadline")) == 80
