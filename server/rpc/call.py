"""What each task adds to the path that all inference RPCs share: `server/rpc/inference.py` walks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

from lora_runtime.types import (
    AdapterCard,
    Classification,
    Embedding,
    Pooling,
    Result,
    SpanLogits,
    Task,
    TokenClassification,
    TokenSequence,
)
from server.backend import TextEncoder
from server.pb.multilora.v1 import common_pb2, inference_pb2


class CallRequest(Protocol):
    """What every request has."""

    adapter: str
    routing_key: str
    priority: int

    @property
    def inputs(self) -> Sequence[Message]: ...


class CallReply(Protocol):
    """What every reply has; the path fills it in."""

    adapter: str
    version: int
    digest: str

    @property
    def timings(self) -> common_pb2.Timings: ...


RequestT = TypeVar("RequestT", bound=CallRequest)
ReplyT = TypeVar("ReplyT", bound=CallReply)
OutputT = TypeVar("OutputT", Classification, TokenClassification, SpanLogits, Embedding)


@dataclass(frozen=True, slots=True)
class Prepared(Generic[ReplyT]):
    """A tokenised request, and how the model's outputs become its reply.

    `interpret` runs in a tokeniser thread and leaves what `CallReply` names to the path.
    """

    sequences: tuple[TokenSequence, ...]
    interpret: Callable[[Result], ReplyT]
    pooling: Pooling | None = None
    input_of: tuple[int, ...] | None = None  # as `Request.input_of`


@dataclass(frozen=True, slots=True)
class Call(Generic[RequestT, ReplyT]):
    """One task's part of the path.

    `check` runs on the event loop, so it looks at single fields only; it raises InvalidRequest. `prepare` runs in a
    tokeniser thread.
    """

    task: Task
    check: Callable[[RequestT], None]
    prepare: Callable[[RequestT, TextEncoder, AdapterCard], Prepared[ReplyT]]


def outputs_of(result: Result, kind: type[OutputT]) -> tuple[OutputT, ...]:
    """The outputs of a result as what its task gives, one for each sequence of the request."""
    outputs = tuple(output for output in result.outputs if isinstance(output, kind))
    assert len(outputs) == len(result.outputs), f"{result.adapter} answered with something else than {kind.__name__}"
    return outputs


def labels_of(result: Result) -> tuple[str, ...]:
    """The labels of the weights that answered."""
    assert result.card.labels is not None, "a result comes from loaded weights, whose labels are known"
    return result.card.labels


def text_pairs(inputs: Sequence[inference_pb2.TextInput]) -> list[tuple[str, str | None]]:
    """Each input as (text, text pair or None)."""
    return [(item.text, item.text_pair if item.HasField("text_pair") else None) for item in inputs]
