"""What an adapter's `multilora.json` says of its prompts and its sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.prompts.chat import Chat, ChatMessage
from lora_runtime.prompts.template import PromptTemplate
from lora_runtime.sampling.params import SamplingParams

NO_DEFAULTS = frozenset({"seed", "n", "logprobs"})  # what a caller asks for, never an adapter
_LISTS = {"stop": str, "stop_token_ids": int}
_FLAGS = frozenset({"include_stop", "ignore_eos"})


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """Of an adapter that generates; each part may be absent."""

    template: PromptTemplate | None = None  # None: the adapter takes texts and conversations only
    is_chat: bool = False  # the rendered template is the user's message of the tokenizer's chat template
    system: str | None = None  # the system's message before it
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of SamplingParams, valid together

    def prompt(self, values: Mapping[str, str], place: str) -> str | Chat:
        """What `TextGeneration.encode_prompts` takes, from the values of the fields.

        Only with a template. Raises InvalidRequest on `{place}.fields` when a field is unknown or missing.
        """
        assert self.template is not None, "the caller refuses fields for an adapter without a template"
        text = self.template.render(values, place)
        if not self.is_chat:
            return text
        system = () if self.system is None else (ChatMessage("system", self.system),)
        return Chat((*system, ChatMessage("user", text)))


def sampling_defaults(content: Mapping[str, object]) -> dict[str, Any]:
    """Fields of SamplingParams from JSON, where lists are tuples; raises ValueError unless they are valid together."""
    known = {param.name for param in fields(SamplingParams)} - NO_DEFAULTS
    if unknown := sorted(content.keys() - known):
        why = "is for requests alone" if unknown[0] in NO_DEFAULTS else "is not known"
        raise ValueError(f"{unknown[0][:64]!r} {why}; these can be set: {', '.join(sorted(known))}")
    values: dict[str, Any] = {name: _value(name, value) for name, value in content.items()}
    try:
        SamplingParams(**values)
    except InvalidRequest as error:
        raise ValueError(error.message.removeprefix("sampling.")) from None
    return values


def _value(name: str, value: object) -> object:
    if name in _FLAGS and not isinstance(value, bool):
        raise ValueError(f"{name} is neither true nor false")
    if name not in _LISTS:
        return value
    if not isinstance(value, list) or not all(isinstance(item, _LISTS[name]) for item in value):
        raise ValueError(f"{name} is not a list of {'texts' if name == 'stop' else 'token ids'}")
    return tuple(value)
