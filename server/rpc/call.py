"""What each task adds to the path that all inference RPCs share: `server/rpc/inference.py` walks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

from lora_runtime.generation import Generated, Generation
from lora_runtime.types import (
    AdapterCard,
    AdapterInfo,
    Classification,
    Embedding,
    Pooling,
    Result,
    SpanLogits,
    Task,
    TokenClassification,
    TokenSequence,
)
from server.backend import Backend, TextEncoder, TextGeneration
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
OutputT = TypeVar("OutputT", Classification, TokenClassification, SpanLogits, Embedding, Generated)


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers: an adapter version whose card is read. Its tools may read a file: for tokeniser threads."""

    backend: Backend
    info: AdapterInfo
    card: AdapterCard
    max_new_tokens: int  # the server's limit

    @property
    def encoder(self) -> TextEncoder:
        return self.backend.encoder_for(self.info)

    @property
    def generation(self) -> TextGeneration:
        """Raises InvalidRequest on `adapter` where the base generates nothing."""
        return self.backend.generation_for(self.info)


@dataclass(frozen=True, slots=True)
class Prepared(Generic[ReplyT]):
    """A tokenised request, and how the model's outputs become its reply.

    `interpret` runs in a tokeniser thread and leaves what `CallReply` names to the path.
    """

    sequences: tuple[TokenSequence, ...]
    interpret: Callable[[Result], ReplyT]
    pooling: Pooling | None = None
    input_of: tuple[int, ...] | None = None  # as `Request.input_of`
    generation: Generation | None = None  # of a GENERATE request; the path adds `on_delta`

    @property
    def num_sequences(self) -> int:
        """As permits count them: each sample is one."""
        return len(self.sequences) * (1 if self.generation is None else self.generation.params.n)


def one_sample(request: CallRequest) -> int:
    """Of a call that has no samples, or one."""
    del request
    return 1


@dataclass(frozen=True, slots=True)
class Call(Generic[RequestT, ReplyT]):
    """One task's part of the path.

    `check` runs on the event loop, so it looks at single fields only; it raises InvalidRequest. `prepare` runs in a
    tokeniser thread.
    """

    task: Task
    check: Callable[[RequestT], None]
    prepare: Callable[[RequestT, Target], Prepared[ReplyT]]
    num_samples: Callable[[RequestT], int] = one_sample  # of each input; after `check`
    otherwise: Call[RequestT, ReplyT] | None = None  # for an adapter of another task

    def suiting(self, info: AdapterInfo) -> Call[RequestT, ReplyT]:
        """This call or the other one, by what an adapter that is read answers; raises as `AdapterInfo.card_for`."""
        other = self.otherwise
        if other is not None and info.card is not None and info.card.task is other.task:
            return other
        info.card_for(self.task)
        return self


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
