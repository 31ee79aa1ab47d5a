"""`multilora.json`: what serving needs and `adapter_config.json` does not say.

`multilora train` writes it beside the adapter; the server reads it. A folder without it is served with labels
from a `config.json` beside the adapter, else `LABEL_i`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lora_runtime.errors import AdapterRejected
from lora_runtime.prompts.spec import PromptSpec, sampling_defaults
from lora_runtime.prompts.template import PromptTemplate, check_text
from lora_runtime.types import Pooling, ProblemType, Task

METADATA_FILE = "multilora.json"
MAX_JSON_BYTES = 4 << 20
MAX_TOKENS = (1 << 31) - 1  # what the protocol can say

LABELLED_TASKS = frozenset({Task.CLASSIFY, Task.CLASSIFY_TOKENS})
_OF_GENERATE = ("prompt_template", "prompt_is_chat", "system_prompt", "generation")

Label = Annotated[str, Field(max_length=256)]


class BaseFingerprint(BaseModel):
    """Which base an adapter was trained on, by content; names are hints only.

    `weights_sha256` hashes fp32 samples of every parameter of the backbone (see `adapters/fingerprint.py`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    modules_sha256: str
    weights_sha256: str


class AdapterMetadata(BaseModel):
    """The content of `multilora.json`. Unknown fields are refused: a promise we do not know is one we would break."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    task: Task
    problem_type: ProblemType = ProblemType.SINGLE_LABEL
    labels: tuple[Label, ...] | None = Field(default=None, min_length=1)  # of a classifier: in the order of its rows
    max_length: int | None = Field(default=None, ge=1, le=MAX_TOKENS)  # tokens, special ones included
    pad_token_id: int | None = Field(default=None, ge=0)
    pooling: Pooling | None = None  # of an EMBED adapter
    normalize: bool = False  # whether an EMBED adapter's vectors are divided by their length
    token_types: bool | None = None  # whether training told the texts of a pair apart; None: as PEFT's class does
    prompt_template: str | None = None  # of a GENERATE adapter, as are the next three: see `prompts/template.py`
    prompt_is_chat: bool = False  # the rendered template is the user's message of the tokenizer's chat template
    system_prompt: str | None = None  # the system's before it
    generation: dict[str, Any] | None = None  # defaults of sampling: see `prompts.spec.sampling_defaults`
    base_model_name: str | None = None
    base: BaseFingerprint | None = None
    digests: dict[str, str] = Field(default_factory=dict[str, str])  # file name → SHA-256, this file excluded
    metrics: dict[str, float] = Field(default_factory=dict[str, float])  # of the best checkpoint, on validation data

    @model_validator(mode="after")
    def _fields_are_those_of_the_task(self) -> AdapterMetadata:
        if (self.labels is not None) != (self.task in LABELLED_TASKS):
            wanted = "need labels" if self.task in LABELLED_TASKS else "have no labels"
            raise ValueError(f"adapters that {self.task} {wanted}")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels repeat; each row of the head needs its own")
        if (self.pooling is not None or self.normalize) and self.task is not Task.EMBED:
            raise ValueError(f"adapters that {self.task} have neither pooling nor normalize")
        return self

    @model_validator(mode="after")
    def _prompt_is_that_of_a_generator(self) -> AdapterMetadata:
        asked = [name for name in _OF_GENERATE if getattr(self, name) not in (None, False)]
        if asked and self.task is not Task.GENERATE:
            raise ValueError(f"adapters that {self.task} have no {asked[0]}; it is for those that generate")
        if self.prompt_is_chat and self.prompt_template is None:
            raise ValueError("prompt_is_chat needs a prompt_template, which becomes the user's message")
        if self.system_prompt is not None and not self.prompt_is_chat:
            raise ValueError("system_prompt needs prompt_is_chat: a plain prompt has no system's message")
        return self

    @field_validator("prompt_template")
    @classmethod
    def _template_parses(cls, text: str | None) -> str | None:
        if text is not None:
            PromptTemplate.parse(text)
        return text

    @field_validator("system_prompt")
    @classmethod
    def _system_is_text(cls, text: str | None) -> str | None:
        if text is not None:
            check_text(text)
        return text

    @field_validator("generation")
    @classmethod
    def _defaults_are_valid(cls, content: dict[str, Any] | None) -> dict[str, Any] | None:
        if content is not None:
            sampling_defaults(content)
        return content

    @property
    def prompt(self) -> PromptSpec | None:
        """What the four fields of generation say, None where none does."""
        if self.prompt_template is None and not self.generation:
            return None
        template = None if self.prompt_template is None else PromptTemplate.parse(self.prompt_template)
        defaults = sampling_defaults(self.generation or {})
        return PromptSpec(template, self.prompt_is_chat, self.system_prompt, defaults)

    def write(self, folder: Path) -> None:
        """Write `folder/multilora.json`, indented, keys in declaration order."""
        unsaid = {name for name in ("normalize", "prompt_is_chat") if not getattr(self, name)}
        text = self.model_dump_json(indent=2, exclude_none=True, exclude=unsaid)
        (folder / METADATA_FILE).write_text(text + "\n", encoding="utf-8")


def read_metadata(folder: Path) -> AdapterMetadata | None:
    """The folder's metadata, None without the file; raises AdapterRejected when it is not valid."""
    path = folder / METADATA_FILE
    return parse_metadata(read_json_object(path)) if path.exists() else None


def parse_metadata(content: Mapping[str, object]) -> AdapterMetadata:
    """Check the content of `multilora.json`."""
    try:
        return AdapterMetadata.model_validate(content)
    except ValidationError as error:
        raise AdapterRejected("METADATA_INVALID", METADATA_FILE, describe_validation(error)) from error


def read_json_object(path: Path) -> dict[str, object]:
    """One JSON object from `path`; raises AdapterRejected for anything else, or more than 4 MiB of it."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise AdapterRejected("JSON_TOO_LARGE", path.name, f"is larger than {MAX_JSON_BYTES >> 20} MiB")
    return parse_json_object(path.read_bytes(), path.name)


def parse_json_object(data: bytes, file: str) -> dict[str, object]:
    """The JSON object that the bytes of a file are; raises AdapterRejected for anything else."""
    value = parse_json(data, file)
    if not isinstance(value, dict):
        raise AdapterRejected("JSON_INVALID", file, f"holds a JSON {type(value).__name__}, not an object")
    return value


def parse_json(data: bytes, file: str) -> Any:
    """Any JSON value; raises AdapterRejected for anything else."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterRejected("JSON_INVALID", file, f"is not valid JSON ({error})") from error


def describe_validation(error: ValidationError) -> str:
    """The first problem of a pydantic error as `field: what is wrong`."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "content"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"field {place}: {first['msg']}{more}"
