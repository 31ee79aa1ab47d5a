"""What each task is told beside its files. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.prompts.spec import sampling_defaults
from lora_runtime.prompts.template import PromptTemplate, check_text
from lora_runtime.train.private.settings import Privacy
from lora_runtime.train.rows.answer import AnswerSchema
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.train.rows.embed import EmbedSchema
from lora_runtime.train.rows.prompt import PromptSchema
from lora_runtime.train.rows.tokens import TokensSchema
from lora_runtime.types import Pooling

TRANSLATE_TEMPLATE = "{text}\n"
GENERATE_TEMPLATE = "{prompt}"


@dataclass(frozen=True, slots=True)
class ClassifyOptions:
    """Labels or a value for a text or a pair."""

    schema: ClassifySchema = field(default_factory=ClassifySchema)
    privacy: Privacy | None = None  # see `private/`; None: ordinary training

    def __post_init__(self) -> None:
        if not self.schema.separator:
            raise InvalidRequest("separator", "is empty; allowed: a character that no label holds")


@dataclass(frozen=True, slots=True)
class TokensOptions:
    """A tag for each word."""

    schema: TokensSchema = field(default_factory=TokensSchema)


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """A span of a context, or none."""

    schema: AnswerSchema = field(default_factory=AnswerSchema)
    doc_stride: int | None = None  # tokens that windows of a long context share; None: as serving does
    max_answer_tokens: int = 30  # of the answers that validation looks for

    def __post_init__(self) -> None:
        if self.doc_stride is not None and self.doc_stride < 0:
            raise InvalidRequest("doc_stride", f"is {self.doc_stride}; allowed: 0 or more")
        if self.max_answer_tokens < 1:
            raise InvalidRequest("max_answer_tokens", f"is {self.max_answer_tokens}; allowed: 1 or more")


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """A text that goes on from a prompt. What `multilora.json` will say of prompts and sampling is said here."""

    template: str = GENERATE_TEMPLATE
    columns: Mapping[str, str] = field(default_factory=dict[str, str])  # of fields whose column is named otherwise
    completion: str = "completion"
    is_chat: bool = False  # the rendered template is the user's message of the tokenizer's chat template
    system: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])  # defaults of sampling
    is_translation: bool = False  # sample translations are compared with the targets
    eval_samples: int = 0  # validation rows that are continued in each validation pass

    def __post_init__(self) -> None:
        if self.eval_samples < 0:
            raise InvalidRequest("eval_samples", f"is {self.eval_samples}; allowed: 0 or more")
        if self.system is not None and not self.is_chat:
            raise InvalidRequest("system", "needs chat: a plain prompt has no system's message")
        for name, check in (("template", self._parse), ("system", self._check_system), ("generation", self._defaults)):
            try:
                check()
            except ValueError as error:
                raise InvalidRequest(name, str(error)) from None
        if unknown := sorted(self.columns.keys() - self.parsed.fields):
            known = ", ".join(sorted(self.parsed.fields))
            raise InvalidRequest("field", f"{unknown[0]!r} is not in the template, whose fields are {known}")

    def _parse(self) -> None:
        PromptTemplate.parse(self.template)

    def _check_system(self) -> None:
        check_text(self.system or "")

    def _defaults(self) -> None:
        sampling_defaults(self.generation)

    @property
    def parsed(self) -> PromptTemplate:
        return PromptTemplate.parse(self.template)

    @property
    def schema(self) -> PromptSchema:
        fields = {name: self.columns.get(name, name) for name in sorted(self.parsed.fields)}
        return PromptSchema(fields, self.completion)


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """A vector of a text, close to those of texts that mean the same."""

    schema: EmbedSchema = field(default_factory=EmbedSchema)
    pooling: Pooling | None = None  # None: mean of an encoder, the last token of a decoder
    normalize: bool = True
    temperature: float = 0.05  # the cosines of a batch are divided by it

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InvalidRequest("temperature", f"is {self.temperature}; allowed: greater than 0")


TaskOptions = ClassifyOptions | TokensOptions | AnswerOptions | PromptOptions | EmbedOptions
