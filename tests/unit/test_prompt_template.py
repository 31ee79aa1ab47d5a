"""Prompt templates of adapters, and what `multilora.json` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.adapters.metadata import AdapterMetadata, parse_metadata, read_metadata
from lora_runtime.errors import AdapterRejected, InvalidRequest
from lora_runtime.prompts.chat import Chat, ChatMessage
from lora_runtime.prompts.spec import PromptSpec
from lora_runtime.prompts.template import MAX_FIELDS, MAX_TEMPLATE_CHARS, PromptTemplate
from lora_runtime.types import Task

RAG = "Question: {question}\nContext: {context}\nAnswer:"
SPECIAL = st.text(st.sampled_from("{}!:.[]0aquestion_ %$\\\n"), max_size=30) | st.text(max_size=30)


def test_fields_are_put_in_their_places() -> None:
    template = PromptTemplate.parse(RAG)
    assert template.fields == {"question", "context"}
    rendered = template.render({"context": "Sky is blue.", "question": "Which colour?"}, "inputs[0]")
    assert rendered == "Question: Which colour?\nContext: Sky is blue.\nAnswer:"


def test_a_field_may_be_used_twice_and_braces_doubled() -> None:
    assert PromptTemplate.parse("{{{a}}} {a}{a}").render({"a": "x"}, "inputs[0]") == "{x} xx"


@given(question=SPECIAL, context=SPECIAL)
def test_values_are_never_interpreted(question: str, context: str) -> None:
    rendered = PromptTemplate.parse(RAG).render({"question": question, "context": context}, "inputs[0]")
    assert rendered == "Question: " + question + "\nContext: " + context + "\nAnswer:"


@given(text=SPECIAL, values=st.dictionaries(st.sampled_from(["a", "question", "on_"]), SPECIAL))
def test_a_template_is_refused_or_rendered_as_python_formats_it(text: str, values: dict[str, str]) -> None:
    try:
        template = PromptTemplate.parse(text)
    except ValueError:
        return
    full = {name: values.get(name, "{x}") for name in template.fields}
    assert template.render(full, "inputs[0]") == text.format(**full)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"question": "q"}, "'context' is missing; the adapter's prompt template has the fields context, question"),
        ({"question": "q", "context": "c", "text": "t"}, "'text' is not in the adapter's prompt template"),
    ],
)
def test_unknown_and_missing_fields_are_named(values: dict[str, str], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=r"context, question") as caught:
        PromptTemplate.parse(RAG).render(values, "inputs[2]")
    assert caught.value.field == "inputs[2].fields"
    assert problem in caught.value.description


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no field", "has no field"),
        ("", "has no field"),
        ("{", "is malformed"),
        ("}{text}", "is malformed"),
        ("{a{b}}", "is malformed"),
        ("{}", "not a name"),
        ("{0}", "not a name"),
        ("{a.b}", "not a name"),
        ("{a[0]}", "not a name"),
        ("{a b}", "not a name"),
        ("{" + "a" * 65 + "}", "not a name"),
        ("{a!r}", "a conversion or a format specification"),
        ("{a:>10}", "a conversion or a format specification"),
        ("{a:{b}}", "a conversion or a format specification"),
        ("{text}\ud800", "lone surrogate"),
        ("{text}" + "x" * MAX_TEMPLATE_CHARS, "the limit is 16384"),
        ("".join(f"{{f{i}}}" for i in range(MAX_FIELDS + 1)), "has 33 fields, the limit is 32"),
    ],
)
def test_what_is_no_template_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PromptTemplate.parse(text)
    with pytest.raises(AdapterRejected, match=rf"multilora.json: field prompt_template: .*{problem}") as caught:
        parse_metadata({"task": "generate", "prompt_template": text})
    assert caught.value.code == "METADATA_INVALID"


def test_metadata_makes_the_prompt_of_a_card() -> None:
    content = {
        "task": "generate",
        "prompt_template": "Translate to Chinese: {text}",
        "prompt_is_chat": True,
        "system_prompt": "You translate.",
        "generation": {"temperature": 0, "max_new_tokens": 64, "stop": ["\n"], "stop_token_ids": [3]},
    }
    spec = parse_metadata(content).prompt
    assert spec is not None
    assert spec.defaults == {"temperature": 0, "max_new_tokens": 64, "stop": ("\n",), "stop_token_ids": (3,)}
    user = ChatMessage("user", "Translate to Chinese: hi")
    assert spec.prompt({"text": "hi"}, "inputs[0]") == Chat((ChatMessage("system", "You translate."), user))


def test_a_plain_template_makes_a_text() -> None:
    assert PromptSpec(PromptTemplate.parse("To {a}:")).prompt({"a": "b"}, "inputs[0]") == "To b:"


def test_metadata_without_prompts_has_none() -> None:
    assert parse_metadata({"task": "generate"}).prompt is None
    defaults = parse_metadata({"task": "generate", "generation": {"top_k": 5}}).prompt
    assert defaults == PromptSpec(defaults={"top_k": 5})


def test_metadata_is_written_as_it_is_read(tmp_path: Path) -> None:
    metadata = AdapterMetadata(task=Task.GENERATE, prompt_template="{text}", generation={"stop": ["."]})
    metadata.write(tmp_path)
    assert read_metadata(tmp_path) == metadata
    AdapterMetadata(task=Task.EMBED).write(tmp_path)
    assert "prompt_is_chat" not in json.loads((tmp_path / "multilora.json").read_text())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"task": "embed", "prompt_template": "{text}"}, "adapters that embed have no prompt_template"),
        ({"task": "embed", "generation": {}}, "adapters that embed have no generation"),
        ({"prompt_is_chat": True}, "prompt_is_chat needs a prompt_template"),
        ({"prompt_template": "{a}", "system_prompt": "s"}, "system_prompt needs prompt_is_chat"),
        ({"prompt_template": "{a}", "prompt_is_chat": True, "system_prompt": "\ud800"}, "lone surrogate"),
        ({"prompt_template": "{a}", "prompt_is_chat": True, "system_prompt": "s" * 16385}, "the limit is 16384"),
        ({"generation": {"seed": 1}}, "'seed' is for requests alone"),
        ({"generation": {"n": 2}}, "'n' is for requests alone"),
        ({"generation": {"temprature": 1}}, "'temprature' is not known"),
        ({"generation": {"temperature": -1}}, "temperature: -1 is not allowed"),
        ({"generation": {"top_k": 1.5}}, "top_k: 1.5 is not an integer"),
        ({"generation": {"stop": "."}}, "stop is not a list of texts"),
        ({"generation": {"stop": [1]}}, "stop is not a list of texts"),
        ({"generation": {"stop_token_ids": ["1"]}}, "stop_token_ids is not a list of token ids"),
        ({"generation": {"ignore_eos": 1}}, "ignore_eos is neither true nor false"),
        ({"generation": {"min_new_tokens": 9, "max_new_tokens": 8}}, "9 is above max_new_tokens"),
        ({"generation": {"top_p": None}}, "top_p: None is not a finite number"),
    ],
)
def test_what_metadata_cannot_promise_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(AdapterRejected, match=r"multilora\.json") as caught:
        parse_metadata({"task": "generate"} | fields)
    assert problem in caught.value.message
