"""From prompts and sampling as a caller gives them to a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_runtime.errors import InvalidRequest
from lora_runtime.generation import Delta, Generation
from lora_runtime.model.text_generation import TextGeneration
from lora_runtime.prompts.chat import Chat
from lora_runtime.prompts.spec import PromptSpec
from lora_runtime.sampling.constrained import ConstraintKind
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.types import AdapterInfo, Request, Task

Prompt = str | Chat | Mapping[str, str]  # the last: values of the fields of the adapter's prompt template


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller wants of an adapter that generates; `sampling` None: what the adapter's files say."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams | None = None
    constraint: tuple[ConstraintKind, str] | None = None
    on_delta: Callable[[Delta], None] | None = None

    def request(self, name: str, info: AdapterInfo, text: TextGeneration) -> Request:
        """Raises InvalidRequest on the field that is wrong, TextTooLong for a prompt that fills the context."""
        assert info.card is not None, "an adapter that is asked has been read"
        spec = info.card.prompt or PromptSpec()
        params = self.sampling or SamplingParams(**spec.defaults)
        params.check_vocabulary(text.vocab_size)
        prompts = [_prompt(prompt, f"inputs[{i}]", spec) for i, prompt in enumerate(self.prompts)]
        limit = info.card.max_length
        generation = Generation(
            params.seeded(),
            text.new_text,
            text.eos_token_ids,
            None if self.constraint is None else text.compile(*self.constraint),
            self.on_delta,
            limit,
        )
        sequences = text.encode_prompts(prompts, max_length=limit)
        return Request(name, info.id, Task.GENERATE, sequences, generation=generation)


def _prompt(prompt: object, place: str, spec: PromptSpec) -> str | Chat:
    match prompt:
        case str() | Chat():
            return prompt
        case Mapping() if spec.template is None:
            raise InvalidRequest(f"{place}.fields", "the adapter has no prompt template; send a text")
        case Mapping():
            return spec.prompt(prompt, place)
        case _:
            kind = type(prompt).__name__
            raise InvalidRequest(place, f"is a {kind}; a text, a conversation or a template's fields are needed")
