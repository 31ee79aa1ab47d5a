"""What a generating request asks beside its prompts, and what comes back. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lora_runtime.sampling.finish import FinishReason
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.sampling.tokens import SampledToken

if TYPE_CHECKING:
    from lora_runtime.sampling.row import LogitsMask


class TextStream(Protocol):
    """The text of one sequence, token by token: `sampling.detokenize.TokenText`."""

    def append(self, token_id: int) -> str:
        """Take a token; the text that is sure now."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class Delta(NamedTuple):
    """What a step added to one sample. The texts of a sample's deltas join to the text of its end."""

    sequence: int  # of the request
    sample: int  # of that sequence, below `params.n`
    text: str  # valid UTF-8, and no part of a stop string; may be empty
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """How each sequence of a request, a prompt, goes on.

    `on_delta` is called in the engine's thread after each step that added something: it must neither block nor raise.
    The request's future is settled after its last delta.
    """

    params: SamplingParams  # `seeded()`
    new_text: Callable[[], TextStream]  # for each sample
    eos_token_ids: frozenset[int] = frozenset()
    new_mask: Callable[[], LogitsMask] | None = None  # of a constraint at its start, for each sample
    on_delta: Callable[[Delta], None] | None = None
    max_length: int | None = None  # tokens of prompt and text together; None: what the engine allows


@dataclass(frozen=True, slots=True)
class Sample:
    """One text that was generated."""

    text: str
    tokens: tuple[SampledToken, ...]  # all that were drawn, with an EOS or stop token at the end
    finish_reason: FinishReason
    stop: str | None = None  # the stop string found


@dataclass(frozen=True, slots=True)
class Generated:
    """The answer for one sequence: `params.n` samples."""

    samples: tuple[Sample, ...]
    num_cached_tokens: int = 0  # of the prompt, that were not computed again
    first_token_s: float = 0.0  # from the request's submission until the first token of the first sample
