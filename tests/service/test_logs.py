"""What the server logs: lines that machines read, the request's id in them, and never a text or a key."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from lora_runtime.types import Request, Result
from server import logs
from server.pb.multilora.v1 import adapters_pb2
from server.tenancy.model import Role
from tests.service.fake_runtime import write_adapter
from tests.service.harness import (
    Harness,
    classify_request,
    embed_request,
    generate_request,
    question_request,
    tokens_request,
    translate_request,
)
from tests.service.tenants import guarded, make_door

SECRET = "Sesame-4711"


@pytest.fixture
def configured() -> Iterator[io.StringIO]:
    """Everything that is logged, as the command line sets it up at the most talkative."""
    stream, root = io.StringIO(), logging.getLogger()
    kept = root.handlers[:], root.level, logging.raiseExceptions
    root.handlers.clear()  # basicConfig would close pytest's
    logs.configure("debug", "auto", "all", stream)
    yield stream
    root.handlers[:], logging.raiseExceptions = kept[0], kept[2]
    root.setLevel(kept[1])
    logging.captureWarnings(False)
    logs.configure_access("all")


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def access_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines_of(stream) if line["logger"] == "server.access"]


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_an_rpc_has_one_line_that_says_what_it_was_and_took(configured: io.StringIO, server: Harness) -> None:
    request, id_of_caller = classify_request("spam", "one", "two words"), (("x-request-id", "abc-1"),)
    await server.inference.Classify(request, metadata=id_of_caller)
    (line,) = access_lines(configured)
    assert {name: line[name] for name in ("method", "code", "tenant", "principal", "request_id", "level")} == {
        "method": "multilora.v1.InferenceService/Classify",
        "code": "OK",
        "tenant": "default",
        "principal": "anybody",
        "request_id": "abc-1",
        "level": "info",
    }
    assert line["adapter"] == "tenants/default/adapters/spam/versions/1"
    assert (line["num_sequences"], line["input_tokens"]) == (2, 7)
    assert line["queue_seconds"] == 0.001
    assert 0 < line["tokenize_seconds"] < line["total_seconds"] <= line["seconds"]


async def test_a_failure_is_a_line_with_its_reason_and_an_id_of_ours(configured: io.StringIO, server: Harness) -> None:
    assert await code_of(server.inference.Classify(classify_request("absent", "x"))) is grpc.StatusCode.NOT_FOUND
    (line,) = access_lines(configured)
    assert (line["code"], line["reason"]) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert len(line["request_id"]) == 32


async def test_access_lines_can_be_of_failures_alone_or_off(configured: io.StringIO, server: Harness) -> None:
    for access, expected in (("errors", ["NOT_FOUND"]), ("off", [])):
        logs.configure_access(access)
        configured.truncate(0)
        configured.seek(0)
        await server.inference.Classify(classify_request("spam", "x"))
        await code_of(server.inference.Classify(classify_request("absent", "x")))
        assert [line["code"] for line in access_lines(configured)] == expected


def test_a_terminal_gets_text() -> None:
    record = logging.LogRecord("server.access", logging.INFO, "", 0, "rpc", (), None)
    record.__dict__.update(logs.fields(code="OK", adapter="", seconds=0.5))
    text = logs.TextFormatter().format(record)
    assert text.endswith(" INFO server.access: rpc code=OK seconds=0.5")


async def test_no_text_and_no_key_is_in_any_log(configured: io.StringIO, tmp_path: Path) -> None:
    """A whole scenario at level debug: every task, streams, wrong requests, faults of ours that quote the text."""
    root = tmp_path / "acme"
    for name, more in (
        ("spam", {"labels": ["ham", "spam"]}),
        ("people", {"task": "classify_tokens", "labels": ["O", "B-PER"]}),
        ("reader", {"task": "answer", "labels": []}),
        ("vectors", {"task": "embed"}),
        ("writer", {"task": "generate"}),
    ):
        write_adapter(root / "acme" / name / "1", **more)
    door = make_door(tmp_path / "door")
    roles = (Role.INFER, Role.ADAPTERS)
    async with guarded(root, door, [("acme", "acme", roles)], max_input_chars=10_000) as (server, callers):
        acme = callers["acme"]
        texts = (SECRET, f"{SECRET} again")
        answered = [
            ("Classify", classify_request("spam", *texts)),
            ("ClassifyTokens", tokens_request("people", *texts)),
            ("AnswerQuestion", question_request("reader", (SECRET, f"where is {SECRET}"))),
            ("Embed", embed_request("vectors", *texts)),
            ("Generate", generate_request("writer", SECRET)),
            ("Translate", translate_request("writer", SECRET)),
            ("GenerateStream", generate_request("writer", SECRET)),
        ]
        codes = [await code_of(acme(method, request)) for method, request in answered]
        assert codes == [grpc.StatusCode.OK] * len(codes)
        wrong = [
            ("Classify", classify_request("spam", SECRET * 1000)),
            ("Classify", classify_request("vectors", SECRET)),
            ("Classify", classify_request("spam", SECRET, top_k=-1)),
            ("Generate", generate_request("writer", SECRET, sampling={"temperature": -1})),
            ("GetAdapter", adapters_pb2.GetAdapterRequest(adapter="absent")),
        ]
        codes = [await code_of(acme(method, request)) for method, request in wrong]
        assert grpc.StatusCode.OK not in codes

        def fail(request: Request) -> Result:
            raise ValueError(f"cannot digest {SECRET!r} of {request.request_id}")

        server.engine.answer = fail
        assert await code_of(acme("Classify", classify_request("spam", SECRET))) is grpc.StatusCode.INTERNAL
        await code_of(
            server.inference.Classify(classify_request("spam", SECRET), metadata=(("authorization", "Bearer x"),))
        )
        asyncio.get_running_loop().set_exception_handler(logs.log_loop_failure)
        asyncio.get_running_loop().call_exception_handler({"message": "a task failed", "exception": ValueError(SECRET)})
        try:
            raise RuntimeError("x") from ValueError(SECRET)
        except RuntimeError:
            logging.getLogger("grpc._cython").exception("unexpected")
        (key,) = (value.removeprefix("Bearer ") for _, value in acme.metadata)
    written = configured.getvalue()
    assert SECRET not in written
    assert key not in written
    assert key.rpartition("_")[2] not in written
    lines = lines_of(configured)
    (fault,) = [line for line in lines if line["message"].endswith("failed unexpectedly")]
    assert fault["exception"].endswith("ValueError")
    assert "raise ValueError" in fault["exception"], "where it was raised is told"
    assert fault["request_id"] in {line["request_id"] for line in lines if line["logger"] == "server.access"}
    assert len(access_lines(configured)) == len(answered) + len(wrong) + 2


def test_outside_of_requests_a_traceback_says_what_it_says() -> None:
    try:
        raise ValueError("the state folder is odd")
    except ValueError as error:
        record = logging.LogRecord("server.control", logging.ERROR, "", 0, "failed", (), (ValueError, error, None))
    assert "ValueError: the state folder is odd" in json.loads(logs.JsonFormatter().format(record))["exception"]
