"""What each task adds to the translation: its tensors, its settings, and how they become a request of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

from google.protobuf.message import Message

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterCard, Task
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Call, ReplyT, RequestT
from server.rpc.open_inference.tensors import Datatype, Tensor

Texts: TypeAlias = Mapping[str, list[str]]  # by input: [N] each


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A tensor of texts that a request has."""

    name: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """A tensor that a response has: [N, width], -1 any."""

    name: str
    datatype: Datatype
    width: int = -1
    is_ranked: bool = False  # may be asked for as its highest values, with their labels


@dataclass(frozen=True, slots=True)
class Dialect(Generic[RequestT, ReplyT]):
    """One task, in the protocol's terms."""

    task: Task
    call: Call[RequestT, ReplyT]
    inputs: Callable[[AdapterCard], tuple[InputSpec, ...]]
    outputs: Callable[[AdapterCard], tuple[OutputSpec, ...]]
    build: Callable[[Texts, AdapterCard], RequestT]  # raises InvalidRequest on `inputs`
    targets: Callable[[RequestT], Mapping[str, Message]]  # by parameter: the message with the field of that name
    tensors: Callable[[RequestT, ReplyT], dict[str, Tensor]]  # in a tokeniser thread
    is_decoupled: bool = False  # a stream answers a request in several responses


def single_text(_card: AdapterCard) -> tuple[InputSpec, ...]:
    return (InputSpec("text_input"),)


def text_or_pair(_card: AdapterCard) -> tuple[InputSpec, ...]:
    return InputSpec("text_input"), InputSpec("text_pair", optional=True)


def text_inputs(texts: Texts) -> list[inference_pb2.TextInput]:
    pairs = texts.get("text_pair", [None] * len(texts["text_input"]))
    return [
        inference_pb2.TextInput(text=text, text_pair=pair)
        for text, pair in zip(texts["text_input"], pairs, strict=True)
    ]


def fields_in(message: Message, *names: str) -> dict[str, Any]:
    """Parameters that are fields of one message."""
    return dict.fromkeys(names, message)


def check_inputs(texts: Texts, specs: tuple[InputSpec, ...]) -> None:
    """Raise InvalidRequest on `inputs` unless the tensors are those that a model takes."""
    known = [spec.name for spec in specs]
    for name in texts:
        if name not in known:
            raise InvalidRequest(f"inputs.{name[:64]}", f"is no input of this model; it takes {', '.join(known)}")
    for spec in specs:
        if spec.name not in texts and not spec.optional:
            raise InvalidRequest("inputs", f"{spec.name} is missing; the model takes {', '.join(known)}")
