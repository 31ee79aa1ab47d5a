"""The Open Inference Protocol's ModelStreamInfer: pieces of text, several requests on one stream, and its ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lora_runtime.errors import RequestCancelled
from lora_runtime.generation import Delta
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.types import Request, Result
from server.pb.multilora.v1 import inference_pb2
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.open_inference.streaming import MAX_AT_ONCE
from server.tenancy.model import Role
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, failure_of, generate_request, running
from tests.service.open_inference import infer, stub_of, tensors
from tests.service.tenants import guarded, make_door, until


async def answers(stub: Any, *requests: pb.ModelInferRequest, **options: Any) -> list[pb.ModelStreamInferResponse]:
    """All messages of a stream with these requests."""
    return [message async for message in stub.ModelStreamInfer(iter(requests), **options)]


def is_final(message: pb.ModelStreamInferResponse) -> bool:
    return message.infer_response.parameters["triton_final_response"].bool_param


def text_of(messages: list[pb.ModelStreamInferResponse], sample: int = 0) -> str:
    pieces = [m.infer_response for m in messages if not is_final(m)]
    return "".join(tensors(p)["text_output"][0][0] for p in pieces if p.parameters["sample"].int64_param == sample)


async def test_a_text_comes_in_pieces_that_join_to_generate_s(tasks: Harness) -> None:
    sampling = inference_pb2.SamplingParams(n=2, max_new_tokens=4)
    own = (await tasks.inference.Generate(generate_request("writer", "abcdef", sampling=sampling))).results[0]
    request = infer("writer", {"text_input": ["abcdef"]}, id_="q", n=2, max_new_tokens=4)
    messages = await answers(stub_of(tasks), request)

    assert [is_final(message) for message in messages] == [False] * (len(messages) - 1) + [True]
    assert {(message.infer_response.id, message.infer_response.model_name) for message in messages} == {("q", "writer")}
    assert [text_of(messages, sample) for sample in (0, 1)] == [sample.text for sample in own.samples]
    assert messages[-1].infer_response.model_version == "1"
    assert tensors(messages[-1].infer_response) == {
        "text_output": [["", ""]],
        "finish_reason": [["length", "length"]],
        "num_tokens": [[4, 4]],
    }


async def test_outputs_of_a_stream_come_as_asked(tasks: Harness) -> None:
    request = infer("writer", {"text_input": ["abc"]}, outputs=("num_tokens",))
    (only,) = await answers(stub_of(tasks), request)
    assert tensors(only.infer_response) == {"num_tokens": [[4]]}  # with the end-of-sequence token
    assert is_final(only)


async def test_other_tasks_are_answered_in_one_message(tasks: Harness) -> None:
    request = infer("spam", {"text_input": ["one", "two"]}, id_="3")
    (only,) = await answers(stub_of(tasks), request)
    alone = await stub_of(tasks).ModelInfer(request)
    assert is_final(only)
    assert tensors(only.infer_response) == tensors(alone)


async def test_requests_of_one_stream_are_answered_side_by_side(tasks: Harness) -> None:
    tasks.engine.steps = threading.Semaphore(0)
    stub, asked = stub_of(tasks), asyncio.Queue[pb.ModelInferRequest | None]()

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        while (request := await asked.get()) is not None:
            yield request

    call = stub.ModelStreamInfer(requests())
    await asked.put(infer("writer", {"text_input": ["abcdef"]}, id_="slow"))
    await until(lambda: _is(tasks.engine.num_generating == 1))
    await asked.put(infer("writer", {"text_input": ["x"]}, id_="quick", max_new_tokens=1))
    await until(lambda: _is(tasks.engine.num_generating == 2))
    tasks.engine.steps.release()
    messages = [await call.read()]
    while not is_final(messages[-1]):
        messages.append(await call.read())
    assert messages[-1].infer_response.id == "quick"
    tasks.engine.steps.release(100)
    await asked.put(None)
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    assert messages[-1].infer_response.id == "slow"
    assert text_of([m for m in messages if m.infer_response.id == "slow"]) == "abcdef"


async def test_a_request_that_fails_is_answered_and_the_stream_goes_on(tasks: Harness) -> None:
    wrong = infer("writer", {"text_input": ["a", "b"]}, id_="two")
    absent = infer("absent", {"text_input": ["a"]}, id_="none")
    limit = infer("writer", {"text_input": ["a"]}, id_="cold", temperature=-1.0)
    messages = await answers(stub_of(tasks), wrong, absent, limit, infer("spam", {"text_input": ["a"]}, id_="fine"))
    by_id = {message.infer_response.id: message for message in messages}

    def told(id_: str) -> list[str]:
        parameters = by_id[id_].infer_response.parameters
        assert by_id[id_].error_message and is_final(by_id[id_])
        return [parameters[name].string_param for name in ("error_code", "error_reason", "error_field")]

    assert told("two") == ["INVALID_ARGUMENT", "INVALID_REQUEST", "inputs"]
    assert told("cold") == ["INVALID_ARGUMENT", "INVALID_REQUEST", "parameters.temperature"]
    assert told("none") == ["NOT_FOUND", "ADAPTER_NOT_FOUND", ""]
    assert not by_id["fine"].error_message and by_id["fine"].infer_response.outputs


async def test_a_client_may_want_statuses(tasks: Harness) -> None:
    wrong = infer("writer", {"text_input": ["a"]}, temperature=-1.0)
    call = stub_of(tasks).ModelStreamInfer(iter([wrong]), metadata=(("triton_grpc_error", "true"),))
    failure = await failure_of(call.read())
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "parameters.temperature")


async def test_a_message_that_is_none_ends_the_stream(tasks: Harness) -> None:
    call = tasks.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b"\xff\xff"]))
    failure = await failure_of(call.read())
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request")


async def test_nothing_of_the_inside_is_told(tasks: Harness) -> None:
    def explode(_: Any) -> Any:
        raise RuntimeError("secret")

    tasks.engine.answer = explode
    call = stub_of(tasks).ModelStreamInfer(iter([infer("spam", {"text_input": ["a"]})]))
    failure = await failure_of(call.read())
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.message


async def test_a_stream_that_is_cancelled_is_generated_no_further(tasks: Harness) -> None:
    tasks.engine.steps = threading.Semaphore(1)
    requests = [infer("writer", {"text_input": ["abcdef"]}, id_=str(i), ignore_eos=True) for i in range(3)]
    call = stub_of(tasks).ModelStreamInfer(iter(requests))
    assert (await call.read()).infer_response.model_name == "writer"
    await until(lambda: _is(tasks.engine.num_generating == 3))
    call.cancel()
    await until(lambda: _is(tasks.engine.num_generating == 0))
    await tasks.until_admitted(0)
    assert len(tasks.engine.cancelled) == 3
    assert await tasks.sample("multilora_open_streams") == 0


async def test_a_stream_has_so_many_requests_at_once_and_the_rest_waits(tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "spam", labels=["ham", "spam"])
    requests = [infer("spam", {"text_input": ["a"]}, id_=str(i)) for i in range(MAX_AT_ONCE + 20)]
    async with running(tmp_path / "root", max_queued_sequences=256) as server:
        server.engine.gate.clear()
        answering = asyncio.create_task(answers(stub_of(server), *requests))
        await server.until_admitted(MAX_AT_ONCE)
        await asyncio.sleep(0.05)
        assert await server.sample("multilora_admitted_sequences") == MAX_AT_ONCE
        server.engine.gate.set()
        messages = await answering
    assert not any(message.error_message for message in messages)
    assert {message.infer_response.id for message in messages} == {request.id for request in requests}


async def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "writer", task="generate")
    async with running(tmp_path / "root", stream_stall_seconds=0.3, max_queued_sequences=256) as server:

        def endless(request: Request) -> Result:
            assert request.generation is not None and request.generation.on_delta is not None
            for _ in range(200):  # more than what is buffered on the way
                request.generation.on_delta(Delta(0, 0, "x" * 200_000, (SampledToken(1),)))
                time.sleep(0.001)
            while request.request_id not in server.engine.cancelled:
                time.sleep(0.005)
            raise RequestCancelled("the caller went away")

        server.engine.answer = endless
        call = stub_of(server).ModelStreamInfer(iter([infer("writer", {"text_input": ["x"]})]))
        await call.read()
        await server.until_sample("multilora_open_streams", 0.0)
        await server.until_admitted(0)

        async def read_all() -> None:
            while await call.read() is not grpc.aio.EOF:
                pass

        failure = await failure_of(read_all())
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_STALLED")


async def test_a_stream_ends_with_the_deadline(tasks: Harness) -> None:
    tasks.engine.steps = threading.Semaphore(0)
    request = infer("writer", {"text_input": ["abc"]})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(stub_of(tasks), request, timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await tasks.until_admitted(0)


async def test_an_idle_stream_does_not_hold_the_server_up(tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "spam", labels=["ham", "spam"])
    async with running(tmp_path / "root", grace=20.0, drain_delay=0.0) as server:
        asked = asyncio.Event()

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            yield infer("spam", {"text_input": ["a"]})
            await asked.wait()

        call = stub_of(server).ModelStreamInfer(requests())
        await call.read()
        server.stop.set()
        started = time.monotonic()
        failure = await failure_of(call.read())
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.info.reason == "ENGINE_STOPPED"
        assert time.monotonic() - started < 5
        asked.set()


async def test_a_stream_needs_the_right_to_ask(tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "acme" / "news" / "1", labels=["a", "b"])
    keys = (("adapters", "acme", (Role.ADAPTERS,)), ("infer", "acme", (Role.INFER,)))
    async with guarded(tmp_path / "root", make_door(tmp_path / "door"), keys) as (server, callers):
        request, stub = infer("news", {"text_input": ["x"]}), stub_of(server)
        nobody = await failure_of(stub.ModelStreamInfer(iter([request])).read())
        other = stub.ModelStreamInfer(iter([request]), metadata=callers["adapters"].metadata)
        assert nobody.code is grpc.StatusCode.UNAUTHENTICATED
        assert (await failure_of(other.read())).code is grpc.StatusCode.PERMISSION_DENIED
        (only,) = await answers(stub, request, metadata=callers["infer"].metadata)
        assert only.infer_response.model_name == "acme/news"


async def _is(condition: bool) -> bool:
    return condition
