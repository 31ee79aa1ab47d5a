"""What a request has, as prompts; what is wrong with one is named by the field that it came in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_runtime.errors import InvalidRequest
from lora_runtime.prompts.chat import Chat, ChatMessage
from lora_runtime.prompts.spec import PromptSpec
from lora_runtime.types import AdapterCard, TokenSequence
from server.backend import TextGeneration
from server.pb.multilora.v1 import inference_pb2

MAX_MESSAGES = 1024


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model continues, and the field of the request that it comes from, such as `inputs[3].fields`."""

    content: str | Chat
    field: str


def check_prompt(place: str, item: inference_pb2.PromptInput) -> None:
    """Raise InvalidRequest unless an input has exactly one kind of prompt."""
    kinds = [name for name, is_there in _kinds(item) if is_there]
    if len(kinds) != 1:
        problem = f"has {' and '.join(kinds)}" if kinds else "is empty"
        raise InvalidRequest(place, f"{problem}; give one of text, messages and fields")
    if len(item.messages) > MAX_MESSAGES:
        problem = f"has {len(item.messages)} entries, the limit is {MAX_MESSAGES}; leave out the oldest"
        raise InvalidRequest(f"{place}.messages", problem, limit=MAX_MESSAGES)


def prompt_of(place: str, item: inference_pb2.PromptInput, card: AdapterCard) -> Prompt:
    """The prompt of one input that was checked; raises InvalidRequest on `{place}.fields`."""
    if item.messages:
        messages = tuple(ChatMessage(message.role, message.content) for message in item.messages)
        return Prompt(Chat(messages), f"{place}.messages")
    if item.fields:
        spec = templated(card)
        if spec is None:
            problem = "are given, but the adapter has no prompt template; send text or messages"
            raise InvalidRequest(f"{place}.fields", problem)
        return filled(spec, place, dict(item.fields), f"{place}.fields")
    return Prompt(item.text, f"{place}.text")


def templated(card: AdapterCard) -> PromptSpec | None:
    """What the adapter says of its prompts, if it has a template."""
    return None if card.prompt is None or card.prompt.template is None else card.prompt


def fields_of(spec: PromptSpec) -> frozenset[str]:
    """The fields of its template."""
    assert spec.template is not None, "the spec is a templated one"
    return spec.template.fields


def filled(spec: PromptSpec, place: str, values: Mapping[str, str], field: str) -> Prompt:
    """The adapter's template with these values; a prompt that is too long is told of `field`."""
    return Prompt(spec.prompt(values, place), field)


def check_fields(spec: PromptSpec, known: Iterable[str], needed: str, method: str) -> None:
    """Raise InvalidRequest on `adapter` unless a method that fills the fields `known` can fill the template."""
    fields = fields_of(spec)
    if needed not in fields:
        raise InvalidRequest("adapter", f"has a prompt template without the field {needed!r}; use Generate instead")
    if others := sorted(fields - set(known)):
        problem = f"has a prompt template with the field {others[0]!r}, which {method} does not fill; use Generate"
        raise InvalidRequest("adapter", problem)


def encode(text: TextGeneration, prompts: Sequence[Prompt], *, max_length: int | None) -> tuple[TokenSequence, ...]:
    """The prompts' tokens; raises InvalidRequest on the field that a prompt came in."""
    contents = [prompt.content for prompt in prompts]
    try:
        return text.encode_prompts(contents, max_length=max_length)
    except InvalidRequest as error:
        raise _placed(error, prompts) from error


def _placed(error: InvalidRequest, prompts: Sequence[Prompt]) -> InvalidRequest:
    """The tokenizer's error with the field as the caller knows it."""
    for index, prompt in enumerate(prompts):
        if error.field in (f"inputs[{index}].text", f"inputs[{index}].messages") and error.field != prompt.field:
            return error.at(prompt.field)
    return error


def _kinds(item: inference_pb2.PromptInput) -> tuple[tuple[str, bool], ...]:
    return ("text", item.HasField("text")), ("messages", bool(item.messages)), ("fields", bool(item.fields))
