"""Whatever a ModelInfer request has in it, it is answered or refused with a reason, and the server goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.pb.open_inference import grpc_service_pb2 as pb
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, running
from tests.service.open_inference import framed, infer, set_parameters, stub_of, tensors

REFUSALS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
NUM_EXAMPLES, NUM_EXAMPLES_SLOW = 300, 10_000
MODELS = ("spam", "people", "reader", "vectors", "writer", "templated", "base")
INPUTS = ("text_input", "text_pair", "question", "context", "topic", "")
OUTPUTS = (
    "label", "score", "scores", "logits", "text", "start", "end", "count", "answer", "embedding", "text_output",
    "finish_reason", "num_tokens", "nothing",
)  # fmt: skip
PARAMETERS = (
    "top_k", "truncate", "unit", "subword_strategy", "max_answer_tokens", "allow_no_answer", "no_answer_threshold",
    "doc_stride", "pooling", "normalize", "temperature", "top_p", "n", "seed", "stop", "stop_token_ids",
    "max_new_tokens", "min_new_tokens", "ignore_eos", "json_schema", "regex", "logprobs", "priority", "routing_key",
    "triton_new", "sequence_id", "",
)  # fmt: skip

texts = st.one_of(st.text(max_size=12), st.sampled_from(["anna met bob", "who", "a" * 100, "w " * 40, ""]))
sizes = st.one_of(st.sampled_from([1, 2, 3]), st.integers(-(2**63), 2**63 - 1))
values = st.one_of(
    st.booleans(),
    st.integers(-3, 12),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    texts,
    st.sampled_from(
        ["words", "entities", "first", "mean", "last", "0.5", "1e999", "[1]", '["a"]', "[[]]", "{}", "[" * 3000]
    ),
)
raw_contents = st.one_of(st.lists(texts, max_size=3).map(framed), st.binary(max_size=40))


@st.composite
def requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    """From nearly right to nonsense."""
    request = pb.ModelInferRequest(
        model_name=draw(st.one_of(st.sampled_from(MODELS), texts)),
        model_version=draw(st.sampled_from(["", "", "", "1", "2", "default", "x y", "-1"])),
        id=draw(texts),
    )
    for _ in range(draw(st.integers(0, 3))):
        tensor = request.inputs.add(
            name=draw(st.sampled_from(INPUTS)),
            datatype=draw(st.sampled_from(["BYTES", "BYTES", "BYTES", "FP32", ""])),
            shape=draw(st.one_of(st.sampled_from([[1], [1, 1], [2, 1]]), st.lists(sizes, max_size=3))),
        )
        if draw(st.booleans()):
            tensor.contents.bytes_contents.extend(
                draw(st.lists(texts.map(str.encode) | st.binary(max_size=6), max_size=3))
            )
        if draw(st.integers(0, 9)) == 0:
            tensor.contents.int_contents.append(1)
    if draw(st.booleans()):
        request.raw_input_contents.extend(draw(st.lists(raw_contents, max_size=3)))
    for name in draw(st.lists(st.sampled_from(OUTPUTS), max_size=3)):
        output = request.outputs.add(name=name)
        set_parameters(output.parameters, draw(st.dictionaries(st.just("classification"), values, max_size=1)))
    set_parameters(request.parameters, draw(st.dictionaries(st.sampled_from(PARAMETERS), values, max_size=3)))
    return request


@st.composite
def nearly_right(draw: st.DrawFn) -> pb.ModelInferRequest:
    """Right tensors for a model, with settings of any kind."""
    names = {"reader": ("question", "context"), "templated": ("topic",)}
    model = draw(st.sampled_from(MODELS))
    num_texts = draw(st.integers(1, 3))
    column = st.lists(texts, min_size=num_texts, max_size=num_texts)
    inputs = {name: draw(column) for name in names.get(model, ("text_input",))}
    request = infer(model, inputs, raw=draw(st.booleans()))
    set_parameters(request.parameters, draw(st.dictionaries(st.sampled_from(PARAMETERS), values, max_size=2)))
    return request


def check(root: Path, num_examples: int) -> None:
    """All examples on one server: none may harm those that follow."""
    with asyncio.Runner() as runner:
        opening = running(root, max_inputs=8, max_queued_sequences=8)
        server = runner.run(opening.__aenter__())
        try:
            codes: set[str] = set()

            @settings(
                max_examples=num_examples,
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )
            @given(requests() | nearly_right())
            def each(request: pb.ModelInferRequest) -> None:
                codes.add(runner.run(outcome(server, request)))

            each()
            assert codes >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}  # else nothing was tried
            runner.run(server.until_admitted(0))
            assert runner.run(outcome(server, infer("spam", {"text_input": ["one"]}))) == "OK"
        finally:
            runner.run(opening.__aexit__(None, None, None))


async def outcome(server: Harness, request: pb.ModelInferRequest) -> str:
    call: Any = stub_of(server).ModelInfer(request, timeout=30)
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        assert code in REFUSALS, f"{code}: {await call.details()}\n{request}"
        return code.name
    reply = await call
    assert reply.id == request.id
    found = tensors(reply)
    assert [*found] == [output.name for output in request.outputs] or not request.outputs
    assert len({len(rows) for rows in found.values()}) == 1
    return "OK"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "spam", labels=["ham", "spam"])
    write_adapter(tmp_path / "people", task="classify_tokens", labels=["O", "B-PER", "I-PER"])
    write_adapter(tmp_path / "reader", task="answer", labels=[])
    write_adapter(tmp_path / "vectors", task="embed", pooling="cls")
    write_adapter(tmp_path / "writer", task="generate")
    write_adapter(tmp_path / "templated", task="generate", prompt={"template": "On {topic}:"})
    return tmp_path


def test_a_request_of_any_kind_is_answered_or_refused(root: Path) -> None:
    check(root, NUM_EXAMPLES)


@pytest.mark.slow
def test_ten_thousand_requests_of_any_kind_are_answered_or_refused(root: Path) -> None:
    check(root, NUM_EXAMPLES_SLOW)
