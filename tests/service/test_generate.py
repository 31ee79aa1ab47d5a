"""Generate, Translate and written answers, as clients see them. The fake repeats its prompt: see `fake_generation`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lora_runtime.sampling.constrained import ConstraintKind
from lora_runtime.sampling.params import SamplingParams
from server.pb.multilora.v1 import inference_pb2 as pb
from tests.service.fake_generation import CONTEXT, EOS, LOGPROB
from tests.service.fake_runtime import DIGEST, write_adapter
from tests.service.harness import (
    Failure,
    Harness,
    failure_of,
    generate_request,
    question_request,
    running,
    translate_request,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[Harness]:
    """`plain`; `translator` and `asker` with templates; `talker`, a chat with defaults; `open` without a context."""
    root = tmp_path / "adapters"
    write_adapter(root / "plain", task="generate")
    write_adapter(
        root / "translator", task="generate", prompt={"template": "{source_language}>{target_language}:{text}"}
    )
    write_adapter(root / "simple", task="generate", prompt={"template": "T:{text}"})
    write_adapter(root / "asker", task="generate", prompt={"template": "Q:{question} C:{context}"})
    write_adapter(root / "open", task="generate", prompt={"template": "Q:{question}"})
    defaults = {"temperature": 0.5, "max_new_tokens": 3}
    talker = {"template": "{topic}", "chat": True, "system": "brief", "defaults": defaults}
    write_adapter(root / "talker", task="generate", prompt=talker)
    write_adapter(root / "greedy", task="generate", prompt={"defaults": {"temperature": 0.0, "max_new_tokens": 60}})
    write_adapter(root / "tiny", task="generate", max_length=8)
    write_adapter(root / "spam", labels=["ham", "spam"])
    async with running(root, max_inputs=8, max_queued_sequences=16, max_new_tokens=40) as harness:
        yield harness


def fields_request(adapter: str, **fields: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(adapter=adapter, inputs=[pb.PromptInput(fields=fields)])


async def refused(server: Harness, request: Any) -> Failure:
    """The failure of a request that is wrong, which leaves nothing behind."""
    failure = await failure_of(getattr(server.inference, type(request).__name__.removesuffix("Request"))(request))
    assert failure.code is INVALID
    assert not server.engine.seen
    await server.until_admitted(0)
    return failure


async def test_each_prompt_is_continued(server: Harness) -> None:
    reply = await server.inference.Generate(generate_request("plain", "abc", "日本語 😀", sampling={"seed": 1}))
    assert [[sample.text for sample in result.samples] for result in reply.results] == [["abc"], ["日本語 😀"]]
    first = reply.results[0]
    assert (first.num_prompt_tokens, first.num_cached_prompt_tokens) == (3, 1)
    assert first.samples[0].finish_reason == pb.FINISH_REASON_EOS
    assert (first.samples[0].num_tokens, list(first.samples[0].tokens)) == (4, [])
    assert reply.adapter == "tenants/default/adapters/plain/versions/1"
    assert (reply.version, reply.digest) == (1, DIGEST)
    usage = reply.usage
    assert (usage.prompt_tokens, usage.cached_prompt_tokens, usage.generated_tokens) == (8, 2, 10)
    assert 0 < reply.timings.first_token_seconds < reply.timings.total_seconds


async def test_other_tasks_have_no_first_token(tasks: Harness) -> None:
    reply = await tasks.inference.Classify(pb.ClassifyRequest(adapter="spam", inputs=[pb.TextInput(text="x")]))
    assert not reply.timings.HasField("first_token_seconds")


async def test_samples_are_told_apart_and_counted(server: Harness) -> None:
    reply = await server.inference.Generate(generate_request("plain", "abcd", sampling={"n": 3}))
    assert [sample.text for sample in reply.results[0].samples] == ["abcd", "bcd", "cd"]
    assert (reply.usage.prompt_tokens, reply.usage.generated_tokens) == (4, 5 + 4 + 3)


async def test_generation_ends_as_asked(server: Harness) -> None:
    cases: list[tuple[dict[str, Any], str, int, str]] = [
        ({"max_new_tokens": 2}, "ab", pb.FINISH_REASON_LENGTH, ""),
        ({"stop": ["cd"]}, "ab", pb.FINISH_REASON_STOP_STRING, "cd"),
        ({"stop": ["cd"], "include_stop": True}, "abcd", pb.FINISH_REASON_STOP_STRING, "cd"),
        ({"stop_token_ids": [ord("c")]}, "abc", pb.FINISH_REASON_STOP_TOKEN, ""),
        ({"ignore_eos": True, "max_new_tokens": 8}, "abcdabcd", pb.FINISH_REASON_LENGTH, ""),
    ]
    for sampling, text, reason, stop in cases:
        reply = await server.inference.Generate(generate_request("plain", "abcd", sampling=sampling))
        (sample,) = reply.results[0].samples
        assert (sample.text, sample.finish_reason, sample.stop) == (text, reason, stop)


async def test_a_full_context_ends_generation(server: Harness) -> None:
    request = generate_request("plain", "x" * (CONTEXT - 4), sampling={"ignore_eos": True, "max_new_tokens": 40})
    (sample,) = (await server.inference.Generate(request)).results[0].samples
    assert (sample.text, sample.finish_reason) == ("xxxx", pb.FINISH_REASON_LENGTH)


async def test_tokens_come_when_asked_for(server: Harness) -> None:
    reply = await server.inference.Generate(generate_request("plain", "ab", return_tokens=True))
    tokens = reply.results[0].samples[0].tokens
    assert [(token.token_id, token.HasField("logprob")) for token in tokens] == [(97, False), (98, False), (EOS, False)]
    reply = await server.inference.Generate(generate_request("plain", "ab", sampling={"logprobs": 2}))
    token = reply.results[0].samples[0].tokens[0]
    assert (token.token_id, token.logprob) == (97, LOGPROB)
    assert [(other.token_id, other.logprob) for other in token.top_logprobs] == [(97, LOGPROB), (98, LOGPROB - 1)]


async def test_a_conversation_is_the_prompt(server: Harness) -> None:
    messages = [pb.ChatMessage(role="system", content="be"), pb.ChatMessage(role="user", content="hi")]
    request = pb.GenerateRequest(adapter="plain", inputs=[pb.PromptInput(messages=messages)])
    assert (await server.inference.Generate(request)).results[0].samples[0].text == "system:be\nuser:hi\n"


async def test_fields_are_put_into_the_adapters_template(server: Harness) -> None:
    reply = await server.inference.Generate(fields_request("asker", question="who {x}?", context="me"))
    assert reply.results[0].samples[0].text == "Q:who {x}? C:me"


async def test_what_is_not_asked_is_as_the_adapter_says(server: Harness) -> None:
    reply = await server.inference.Generate(fields_request("talker", topic="hi"))
    assert [sample.text for sample in reply.results[0].samples] == ["sys"]  # system:brief…, 3 tokens
    params = asked(server)[-1]
    assert (params.temperature, params.top_p) == (0.5, 1.0)
    request = fields_request("talker", topic="hi")
    request.sampling.max_new_tokens, request.sampling.temperature = 2, 0.0
    assert [sample.text for sample in (await server.inference.Generate(request)).results[0].samples] == ["sy"]
    assert asked(server)[-1].is_greedy


async def test_an_adapters_defaults_keep_the_servers_limit(server: Harness) -> None:
    await server.inference.Generate(generate_request("greedy", "abc"))
    await server.inference.Generate(generate_request("plain", "abc"))
    assert [params.max_new_tokens for params in asked(server)] == [40, 40]


async def test_a_seed_is_drawn_for_who_gives_none(server: Harness) -> None:
    for sampling in ({}, {"seed": 7}):
        await server.inference.Generate(generate_request("plain", "abc", sampling=sampling))
    drawn, given = (params.seed for params in asked(server))
    assert drawn is not None
    assert given == 7


@pytest.mark.parametrize("kind", [*ConstraintKind])
async def test_a_constraint_reaches_the_engine(server: Harness, kind: ConstraintKind) -> None:
    await server.inference.Generate(generate_request("plain", "abc", constraint={kind.value: '{"type": "null"}'}))
    generation = server.engine.seen[0].generation
    assert generation is not None
    assert generation.new_mask is not None
    mask: Any = generation.new_mask()
    assert (mask.kind, mask.text) == (kind, '{"type": "null"}')


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [0x110000]}, "stop_token_ids[0]"),
        ({"min_new_tokens": 41, "max_new_tokens": 40}, "min_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 41}, "max_new_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 2, "temperature": 0.0}, "n"),
    ],
    ids=str,
)
async def test_a_wrong_sampling_field_is_named(server: Harness, sampling: dict[str, Any], field: str) -> None:
    failure = await refused(server, generate_request("plain", "abc", sampling=sampling))
    assert failure.field == f"sampling.{field}"
    if sampling.get("max_new_tokens") == 41:
        assert failure.info.metadata["limit"] == "40"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generate_request("plain"), "inputs"),
        (generate_request("plain", *["x"] * 9), "inputs"),
        (generate_request("plain", *["x"] * 8, sampling={"n": 3}), "inputs"),  # 24 sequences: never
        (generate_request("plain", "x", ""), "inputs[1].text"),
        (generate_request("plain", "x", "y" * CONTEXT), "inputs[1].text"),
        (generate_request("tiny", "y" * 8), "inputs[0].text"),
        (generate_request("plain", "x" * 60, sampling={"min_new_tokens": 5}), "sampling.min_new_tokens"),
        (pb.GenerateRequest(adapter="plain", inputs=[pb.PromptInput()]), "inputs[0]"),
        (pb.GenerateRequest(adapter="open", inputs=[pb.PromptInput(text="x", fields={"question": "y"})]), "inputs[0]"),
        (
            pb.GenerateRequest(adapter="plain", inputs=[pb.PromptInput(messages=[pb.ChatMessage()] * 1025)]),
            "inputs[0].messages",
        ),
        (
            pb.GenerateRequest(
                adapter="plain", inputs=[pb.PromptInput(messages=[{"role": "user", "content": "x" * 64}])]
            ),
            "inputs[0].messages",
        ),
        (generate_request("plain", "x", constraint={}), "constraint"),
        (generate_request("plain", "x", constraint={"json_schema": "{"}), "constraint.json_schema"),
        (fields_request("plain", text="x"), "inputs[0].fields"),
        (fields_request("open", question="x", colour="y"), "inputs[0].fields"),
        (fields_request("asker", question="x"), "inputs[0].fields"),
        (fields_request("asker", question="x" * 40, context="y" * 40), "inputs[0].fields"),
        (fields_request("talker", topic="x" * 64), "inputs[0].fields"),
        (translate_request("plain", "x", target_language="French"), "target_language"),
        (translate_request("simple", "x", source_language="French"), "source_language"),
        (translate_request("translator", "x", source_language="French"), "target_language"),
        (translate_request("translator", "x", source_language="", target_language="French"), "source_language"),
        (translate_request("simple", "x", "y" * CONTEXT), "inputs[1].text"),
        (translate_request("open", "x"), "adapter"),
        (translate_request("simple", "x", sampling={"n": 2}), "sampling.n"),
        (translate_request("simple", "x", sampling={"top_k": -2}), "sampling.top_k"),
        (pb.TranslateRequest(adapter="simple", inputs=[pb.TextInput(text="x", text_pair="y")]), "inputs[0].text_pair"),
        (question_request("plain", ("x", "y")), "adapter"),
        (question_request("simple", ("x", "y")), "adapter"),
        (question_request("open", ("x", "")), None),
        (question_request("open", ("x", "y")), "inputs[0].context"),
        (question_request("open", ("", "")), "inputs[0].question"),
        (question_request("asker", ("x", "y"), top_k=2), "top_k"),
        (question_request("asker", ("x", "y"), allow_no_answer=True), "allow_no_answer"),
        (question_request("asker", ("x", "y"), doc_stride=3), "doc_stride"),
        (question_request("asker", ("x", "y"), max_answer_tokens=41), "max_answer_tokens"),
        (question_request("asker", ("x", "y" * 80)), "inputs[0].context"),
        (question_request("asker", ("x" * 80, "y")), "inputs[0].question"),
    ],
    ids=lambda value: "" if value is None or isinstance(value, str) else f"{type(value).__name__}-{value.adapter}",
)
async def test_what_is_wrong_is_named(server: Harness, request_: Any, field: str | None) -> None:
    if field is None:
        await server.inference.AnswerQuestion(request_)
        return
    failure = await refused(server, request_)
    assert failure.field == field
    if "y" * CONTEXT in str(request_):
        assert failure.info.reason == "TEXT_TOO_LONG"


async def test_long_values_are_counted_wherever_they_are(server: Harness) -> None:
    long = "x" * 262_145
    message = pb.PromptInput(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(role="user", content=long)])
    failure = await refused(server, pb.GenerateRequest(adapter="plain", inputs=[message]))
    assert failure.field == "inputs[0].messages[1].content"
    assert (await refused(server, fields_request("asker", question=long, context=""))).field == "inputs[0].fields"


async def test_texts_are_translated_greedily(server: Harness) -> None:
    languages = {"source_language": "de", "target_language": "fr"}
    reply = await server.inference.Translate(translate_request("translator", "ja", "nein", **languages))
    assert [result.text for result in reply.results] == ["de>fr:ja", "de>fr:nein"]
    assert [result.finish_reason for result in reply.results] == [pb.FINISH_REASON_EOS] * 2
    assert reply.usage.prompt_tokens == 8 + 10
    assert reply.results[0].num_tokens == 9
    plain = await server.inference.Translate(translate_request("plain", "ja", sampling={"max_new_tokens": 1}))
    assert [(result.text, result.finish_reason) for result in plain.results] == [("j", pb.FINISH_REASON_LENGTH)]
    assert all(params.is_greedy for params in asked(server))
    warm = translate_request("plain", "ja", sampling={"temperature": 0.7})
    await server.inference.Translate(warm)
    assert asked(server)[-1].temperature == 0.7


async def test_answers_are_written_by_adapters_that_generate(server: Harness) -> None:
    pairs = [("who?", "me"), ("where?", "")]
    reply = await server.inference.AnswerQuestion(question_request("asker", *pairs, max_answer_tokens=9))
    answers = [result.answers for result in reply.results]
    assert [(answer.text, answer.generated, answer.finish_reason) for (answer,) in answers] == [
        ("Q:who? C:", True, pb.FINISH_REASON_LENGTH),
        ("Q:where? ", True, pb.FINISH_REASON_LENGTH),
    ]
    assert [(answer.start, answer.end, answer.score) for (answer,) in answers] == [(0, 0, 0.0)] * 2
    assert [(result.num_tokens, result.num_windows) for result in reply.results] == [(11, 1), (11, 1)]
    assert reply.usage.generated_tokens == 18
    assert all(params.is_greedy for params in asked(server))


async def test_only_adapters_that_generate_do(server: Harness) -> None:
    for request in (generate_request("spam", "x"), translate_request("base", "x")):
        method = getattr(server.inference, type(request).__name__.removesuffix("Request"))
        failure = await failure_of(method(request))
        assert (failure.code, failure.info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TASK_MISMATCH")


async def test_each_sample_is_a_sequence_of_the_servers(server: Harness) -> None:
    server.engine.gate.clear()
    waiting = server.inference.Generate(generate_request("plain", "ab", "cd", sampling={"n": 6}))
    await server.until_admitted(12)
    failure = await failure_of(server.inference.Generate(generate_request("plain", "ab", sampling={"n": 5})))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    server.engine.gate.set()
    assert len((await waiting).results[1].samples) == 6
    await server.until_admitted(0)


async def test_what_is_generated_is_counted(server: Harness) -> None:
    await server.inference.Generate(generate_request("plain", "abcd", sampling={"n": 2}))
    await server.inference.Generate(generate_request("plain", "abcd", sampling={"max_new_tokens": 3}))
    assert await server.sample("multilora_generated_tokens_total") == 5 + 4 + 3
    assert await server.sample("multilora_time_to_first_token_seconds_count") == 2
    assert await server.sample("multilora_inter_token_seconds_count") == 4 + 3 + 2
    finished = 'multilora_finished_samples_total{{finish_reason="{}"}}'
    assert await server.sample(finished.format("eos")) == 2
    assert await server.sample(finished.format("length")) == 1
    assert await server.sample("multilora_open_streams") == 0


def asked(server: Harness) -> list[SamplingParams]:
    """The sampling of each request that the engine got."""
    return [request.generation.params for request in server.engine.seen if request.generation is not None]
