"""The Open Inference Protocol's ModelInfer: every task's tensors, which say what our own API says."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from server.pb.multilora.v1 import inference_pb2
from server.pb.open_inference import grpc_service_pb2 as pb
from tests.service.harness import (
    Harness,
    classify_request,
    embed_request,
    failure_of,
    generate_request,
    question_request,
    tokens_request,
)
from tests.service.open_inference import framed, infer, stub_of, tensors

TEXTS = ("free prize", "see you at noon")


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
async def test_classification_says_what_classify_says(server: Harness, raw: bool) -> None:
    own = await server.inference.Classify(classify_request("topics", *TEXTS, return_logits=True))
    request = infer("topics", {"text_input": TEXTS}, raw=raw, id_="7", top_k=2)
    reply = await stub_of(server).ModelInfer(request)

    assert (reply.model_name, reply.model_version, reply.id) == ("topics", "1", "7")
    found = tensors(reply)
    assert [*found] == ["label", "score", "scores", "logits"]
    for row, result in enumerate(own.results):
        by_label = {entry.label: entry.score for entry in result.scores}
        assert found["label"][row] == [entry.label for entry in result.scores[:2]]
        assert found["score"][row] == [entry.score for entry in result.scores[:2]]
        assert found["scores"][row] == [by_label[label] for label in own.labels]
        assert found["logits"][row] == [*result.logits]


async def test_one_label_is_the_default_and_outputs_come_as_asked(server: Harness) -> None:
    request = infer("topics", {"text_input": TEXTS}, outputs=("logits", "label"))
    found = tensors(await stub_of(server).ModelInfer(request))
    assert [*found] == ["logits", "label"]
    assert [len(row) for row in found["label"]] == [1, 1]


async def test_scores_come_ranked_when_asked(server: Harness) -> None:
    own = (await server.inference.Classify(classify_request("topics", TEXTS[0], return_logits=True))).results[0]
    request = infer("topics", {"text_input": TEXTS[:1]}, outputs=("scores",))
    request.outputs[0].parameters["classification"].int64_param = 2
    found = tensors(await stub_of(server).ModelInfer(request))["scores"][0]
    labels = ["art", "law", "sport", "tech"]
    expected = [(entry.score, labels.index(entry.label), entry.label) for entry in own.scores[:2]]
    parts = [text.split(":") for text in found]
    assert [(float(value), int(place), label) for value, place, label in parts] == [
        (pytest.approx(score), place, label) for score, place, label in expected
    ]


async def test_a_pair_is_one_input(server: Harness) -> None:
    pair = inference_pb2.TextInput(text="one two", text_pair="three")
    own = await server.inference.Classify(inference_pb2.ClassifyRequest(adapter="spam", inputs=[pair]))
    request = infer("spam", {"text_pair": ["three"], "text_input": ["one two"]})
    found = tensors(await stub_of(server).ModelInfer(request))
    assert found["label"] == [[own.results[0].scores[0].label]]
    assert found["score"] == [[own.results[0].scores[0].score]]


async def test_token_classes_are_rows_of_spans(tasks: Harness) -> None:
    texts = ("anna met bob in rome", "no")
    for unit, number in (("words", inference_pb2.TOKEN_UNIT_WORDS), ("entities", inference_pb2.TOKEN_UNIT_ENTITIES)):
        own = await tasks.inference.ClassifyTokens(tokens_request("people", *texts, unit=number))
        reply = await stub_of(tasks).ModelInfer(infer("people", {"text_input": texts}, unit=unit))
        found = tensors(reply)
        width = max(1, *(len(result.spans) for result in own.results))
        for row, result in enumerate(own.results):
            blanks = width - len(result.spans)
            assert found["count"][row] == [len(result.spans)]
            for name, blank in (("label", ""), ("text", ""), ("score", 0.0), ("start", 0), ("end", 0)):
                expected = [getattr(span, name) for span in result.spans]
                assert found[name][row] == [*expected, *[blank] * blanks], name


async def test_answers_are_rows_of_spans(tasks: Harness) -> None:
    pairs = (("who", "anna met bob in rome"), ("where", "rome"))
    own = await tasks.inference.AnswerQuestion(question_request("reader", *pairs, top_k=3))
    inputs = {"question": [q for q, _ in pairs], "context": [c for _, c in pairs]}
    found = tensors(await stub_of(tasks).ModelInfer(infer("reader", inputs, top_k=3)))
    width = max(len(result.answers) for result in own.results)
    for row, result in enumerate(own.results):
        blanks = width - len(result.answers)
        for name, blank in (("text", ""), ("score", 0.0), ("start", 0), ("end", 0)):
            expected = [getattr(answer, name) for answer in result.answers]
            assert found[name if name != "text" else "answer"][row] == [*expected, *[blank] * blanks]


@pytest.mark.parametrize("model", ["vectors", "base"])
async def test_embeddings_are_embeds(tasks: Harness, model: str) -> None:
    own = await tasks.inference.Embed(embed_request(model, *TEXTS, pooling="POOLING_LAST", normalize=True))
    request = infer(model, {"text_input": TEXTS}, pooling="last", normalize=True)
    reply = await stub_of(tasks).ModelInfer(request)
    assert reply.model_name == model
    assert tensors(reply) == {"embedding": [[*result.values] for result in own.results]}


async def test_generation_takes_its_settings(tasks: Harness) -> None:
    sampling = inference_pb2.SamplingParams(n=2, temperature=0.5, max_new_tokens=3, stop=["z", "y"])
    own = await tasks.inference.Generate(generate_request("writer", "abcdef", "xyz", sampling=sampling))
    request = infer(
        "writer", {"text_input": ["abcdef", "xyz"]}, n=2, temperature="0.5", max_new_tokens=3, stop='["z", "y"]'
    )
    found = tensors(await stub_of(tasks).ModelInfer(request))
    assert found["text_output"] == [[sample.text for sample in result.samples] for result in own.results]
    assert found["text_output"][1] == ["x", ""]
    assert found["finish_reason"] == [["length", "length"], ["stop_string", "stop_string"]]
    assert found["num_tokens"] == [[sample.num_tokens for sample in result.samples] for result in own.results]
    params = tasks.engine.submitted[-1].generation.params  # pyright: ignore
    assert (params.temperature, params.max_new_tokens, params.stop) == (0.5, 3, ("z", "y"))


async def test_a_constraint_is_a_parameter(tasks: Harness) -> None:
    await stub_of(tasks).ModelInfer(infer("writer", {"text_input": ["abc"]}, regex="[a-z]+"))
    mask = tasks.engine.submitted[-1].generation.new_mask()  # pyright: ignore
    assert mask.text == "[a-z]+"


async def test_settings_reach_the_engine_as_our_own_do(server: Harness) -> None:
    request = infer("short", {"text_input": ["1 2 3 4 5"]}, truncate=True, priority=2, routing_key="k")
    await stub_of(server).ModelInfer(request)
    asked = server.engine.submitted[-1]
    assert (asked.priority, asked.sequences[0].truncated) == (2, True)


async def test_what_the_dialect_adds_is_ignored(server: Harness) -> None:
    request = infer("spam", {"text_input": ["one"]}, triton_enable_empty_final_response=True, triton_new_thing="x")
    request.inputs[0].parameters["triton_hint"].bool_param = True
    assert tensors(await stub_of(server).ModelInfer(request))["label"]


@pytest.mark.parametrize("shape", [[2], [2, 1]])
async def test_a_batch_has_one_dimension_or_two(server: Harness, shape: list[int]) -> None:
    request = infer("spam", {"text_input": TEXTS})
    request.inputs[0].shape[:] = shape
    assert len(tensors(await stub_of(server).ModelInfer(request))["label"]) == 2


@pytest.mark.parametrize(
    ("model", "version"),
    [("spam", "1"), ("default/spam", ""), ("spam@1", ""), ("spam", "default"), ("tenants/default/adapters/spam", "1")],
)
async def test_a_model_has_the_spellings_of_an_adapter(server: Harness, model: str, version: str) -> None:
    reply = await stub_of(server).ModelInfer(infer(model, {"text_input": ["one"]}, version=version))
    assert (reply.model_name, reply.model_version) == ("spam", "1")


def changed(request: pb.ModelInferRequest, **changes: Any) -> pb.ModelInferRequest:
    """The request with parts of its first input, or of itself, replaced."""
    for name, value in changes.items():
        owner = request if name == "raw_input_contents" else request.inputs[0]
        if isinstance(value, list):
            del getattr(owner, name)[:]
            getattr(owner, name).extend(value)
        else:
            setattr(owner, name, value)
    return request


def spam(*texts: str | bytes, **more: Any) -> pb.ModelInferRequest:
    return infer(more.pop("model", "spam"), {"text_input": texts or ("one",)}, **more)


def both_contents() -> pb.ModelInferRequest:
    request = spam()
    request.inputs[0].contents.bytes_contents.append(b"one")
    return request


def typed_numbers() -> pb.ModelInferRequest:
    request = spam(raw=False)
    request.inputs[0].contents.int_contents.append(1)
    return request


def shared_memory() -> pb.ModelInferRequest:
    request = spam()
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"
    return request


def ranked(output: str, value: int) -> pb.ModelInferRequest:
    request = spam(outputs=(output,))
    request.outputs[0].parameters["classification"].int64_param = value
    return request


WRONG = [
    (spam(model=""), "model_name"),
    (spam(model="../spam"), "model_name"),
    (spam(model="spam@1x"), "model_name"),
    (spam(version="0"), "model_version"),
    (spam(version="1/adapters/y"), "model_version"),
    (spam(model="spam@1", version="1"), "model_version"),
    (infer("spam", {}), "inputs"),
    (infer("spam", {"text": ["one"]}), "inputs.text"),
    (infer("spam", {"text_pair": ["one"]}), "inputs"),
    (infer("spam", {"text_input": ["a", "b"], "text_pair": ["c"]}), "inputs"),
    (spam(*["one"] * 9), "inputs.text_input.shape"),
    (changed(spam(), shape=[1, 2]), "inputs.text_input.shape"),
    (changed(spam(), shape=[]), "inputs.text_input.shape"),
    (changed(spam(), shape=[0]), "inputs.text_input.shape"),
    (changed(spam(), shape=[-1, 1]), "inputs.text_input.shape"),
    (changed(spam(), shape=[2]), "inputs.text_input.raw_input_contents"),
    (changed(spam(raw=False), shape=[2]), "inputs.text_input.contents.bytes_contents"),
    (changed(spam(), datatype="FP32"), "inputs.text_input.datatype"),
    (changed(spam(), name=""), "inputs.[0].name"),
    (changed(spam(), raw_input_contents=[framed(["one"]) + b"x"]), "inputs.text_input.raw_input_contents"),
    (changed(spam(), raw_input_contents=[b"\xff\xff\xff\xffone"]), "inputs.text_input.raw_input_contents"),
    (changed(spam(), raw_input_contents=[b"\x03"]), "inputs.text_input.raw_input_contents"),
    (changed(spam(), raw_input_contents=[framed(["a"]), framed(["b"])]), "raw_input_contents"),
    (spam("fine", b"\xff"), "inputs.text_input[1]"),
    (both_contents(), "inputs.text_input.contents"),
    (typed_numbers(), "inputs.text_input.contents.int_contents"),
    (shared_memory(), "inputs.text_input.parameters.shared_memory_region"),
    (infer("short", {"text_input": ["one", "1 2 3 4 5"]}), "inputs.text_input[1]"),
    (spam(outputs=("label", "labels")), "outputs.labels"),
    (spam(outputs=("label", "label")), "outputs.label"),
    (ranked("scores", 0), "outputs.scores.parameters.classification"),
    (ranked("label", 1), "outputs.label.parameters.classification"),
    (spam(top_k=0), "parameters.top_k"),
    (spam(top_k="many"), "parameters.top_k"),
    (spam(top_k=2**40), "parameters.top_k"),
    (spam(truncate="yes"), "parameters.truncate"),
    (spam(priority=9), "parameters.priority"),
    (spam(routing_key="k" * 257), "parameters.routing_key"),
    (spam(temperature=1.0), "parameters.temperature"),
    (spam(sequence_id=3), "parameters.sequence_id"),
]


@pytest.mark.parametrize(("request_", "field"), WRONG)
async def test_a_wrong_field_is_named(server: Harness, request_: pb.ModelInferRequest, field: str) -> None:
    failure = await failure_of(stub_of(server).ModelInfer(request_))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.field == field
    assert failure.info.domain == "multilora"
    assert not server.engine.submitted


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (infer("people", {"text_input": ["a"]}, unit="letters"), "parameters.unit"),
        (infer("people", {"text_input": ["a"], "text_pair": ["b"]}), "inputs.text_pair"),
        (infer("reader", {"question": ["who"], "context": [""]}), "inputs.context[0]"),
        (infer("reader", {"question": ["who"]}), "inputs"),
        (infer("reader", {"question": ["q"], "context": ["a"]}, doc_stride=-1), "parameters.doc_stride"),
        (infer("vectors", {"text_input": ["a"]}, pooling="max"), "parameters.pooling"),
        (infer("writer", {"text_input": ["a", ""]}), "inputs.text_input[1]"),
        (infer("writer", {"text_input": ["a" * 64]}), "inputs.text_input[0]"),
        (infer("writer", {"text_input": ["a"]}, temperature="hot"), "parameters.temperature"),
        (infer("writer", {"text_input": ["a"]}, temperature=-1.0), "parameters.temperature"),
        (infer("writer", {"text_input": ["a"]}, n=2, temperature=0), "parameters.n"),
        (infer("writer", {"text_input": ["a"]}, stop_token_ids="[1, true]"), "parameters.stop_token_ids"),
        (infer("writer", {"text_input": ["a"]}, stop_token_ids="[9999999999]"), "parameters.stop_token_ids"),
        (infer("writer", {"text_input": ["a"]}, stop='["a", ""]'), "parameters.stop[1]"),
        (infer("writer", {"text_input": ["a"]}, json_schema="{", ), "parameters.json_schema"),
        (infer("writer", {"text_input": ["a"]}, json_schema="{}", regex="a"), "parameters.regex"),
        (infer("writer", {"text_input": ["a"]}, logprobs=2), "parameters.logprobs"),
        (infer("writer", {"topic": ["a"]}), "inputs.topic"),
    ],
)  # fmt: skip
async def test_a_wrong_field_of_each_task_is_named(tasks: Harness, request_: Any, field: str) -> None:
    failure = await failure_of(stub_of(tasks).ModelInfer(request_))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.field == field


async def test_what_cannot_answer_is_an_error_as_our_own(server: Harness) -> None:
    stub = stub_of(server)
    unknown = await failure_of(stub.ModelInfer(spam(model="absent")))
    refused = await failure_of(stub.ModelInfer(spam(model="garbled")))
    long = await failure_of(stub.ModelInfer(infer("short", {"text_input": ["1 2 3 4 5"]})))
    assert (unknown.code, unknown.info.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert (refused.code, refused.info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_FAILED")
    assert (long.info.reason, long.info.metadata["limit"]) == ("TEXT_TOO_LONG", "6")


async def test_no_message_of_the_protocol_is_an_error_with_a_reason(server: Harness) -> None:
    call = server.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    failure = await failure_of(call(b"\xff\xff\xff"))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request")
