"""Generation by a real tokenizer, template and grammar; the engine repeats prompts: see `fake_generation`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.pb.multilora.v1 import inference_pb2 as pb
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, failure_of, generate_request, running, translate_request
from tests.unit.test_text_generation import generation_of

CHAT = {"template": "Say {what}", "chat": True, "system": "be brief"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[Harness]:
    root = tmp_path / "adapters"
    write_adapter(root / "plain", task="generate")
    write_adapter(root / "sayer", task="generate", prompt=CHAT)
    write_adapter(root / "fr", task="generate", prompt={"template": "To {target_language}: {text}"})
    text = generation_of(family="gpt2")
    async with running(root) as harness:
        runtime: Any = harness.runtime
        runtime.generation_for = lambda _: text
        yield harness


def messages(*turns: tuple[str, str]) -> pb.GenerateRequest:
    said = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(adapter="plain", inputs=[pb.PromptInput(messages=said)])


def fields(adapter: str, **values: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(adapter=adapter, inputs=[pb.PromptInput(fields=values)])


@pytest.mark.parametrize(
    "request_",
    [
        generate_request("plain", "the cat"),
        messages(("system", "be"), ("user", "the cat")),
        fields("sayer", what="the cat"),
        fields("fr", text="the cat", target_language="French"),
        generate_request("plain", "the cat", constraint={"regex": "[a-z ]+"}),
        generate_request("plain", "the cat", constraint={"json_schema": '{"type": "integer"}'}),
    ],
    ids=["text", "messages", "chat", "template", "regex", "schema"],
)
async def test_prompts_of_every_kind_reach_the_engine(server: Harness, request_: pb.GenerateRequest) -> None:
    request_.sampling.max_new_tokens = 8
    reply = await server.inference.Generate(request_)
    (work,) = server.engine.seen
    text, generation = generation_of(family="gpt2"), work.generation
    assert generation is not None
    assert reply.results[0].num_prompt_tokens == work.sequences[0].num_tokens > 1
    stream = text.new_text()
    wanted = "".join(stream.append(token) for token in work.sequences[0].input_ids[:8]) + stream.flush()
    assert reply.results[0].samples[0].text == wanted
    assert (generation.new_mask is not None) == request_.HasField("constraint")
    if generation.new_mask is not None:
        assert generation.new_mask().allowed().any()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generate_request("plain", "cat " * 200), "inputs[0].text"),
        (messages(("user", "cat " * 200)), "inputs[0].messages"),
        (messages(("user", "a </s> b")), "inputs[0].messages"),
        (messages(("robot", "a")), "inputs[0].messages"),
        (messages(("user", "a"), ("system", "b")), "inputs[0].messages"),
        (fields("sayer", what="cat " * 200), "inputs[0].fields"),
        (fields("sayer", what="a </s> b"), "inputs[0].fields"),
        (translate_request("fr", "cat " * 200, target_language="French"), "inputs[0].text"),
        (generate_request("plain", "a", constraint={"regex": "(("}), "constraint.regex"),
        (generate_request("plain", "a", constraint={"json_schema": '{"type": "colour"}'}), "constraint.json_schema"),
        (generate_request("plain", "a", sampling={"stop_token_ids": [1000]}), "sampling.stop_token_ids[0]"),
    ],
    ids=str,
)
async def test_what_a_tokenizer_refuses_is_named_by_the_field_it_came_in(
    server: Harness, request_: Any, field: str
) -> None:
    call = getattr(server.inference, type(request_).__name__.removesuffix("Request"))
    failure = await failure_of(call(request_))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    if "cat " * 200 in str(request_):
        assert failure.info.reason == "TEXT_TOO_LONG"
    assert not server.engine.seen
    await server.until_admitted(0)
