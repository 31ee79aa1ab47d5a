"""Generation without a model: a token is a character, and sample k of a prompt repeats it from its k-th character on.

So sample 0 of `abc` is `abc` and sample 1 is `bc`; an end-of-sequence token follows, unless it is ignored: then the
prompt is repeated for ever.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_runtime.errors import InvalidRequest, TextTooLong
from lora_runtime.generation import Delta, Generated, Generation, Sample
from lora_runtime.prompts.chat import Chat
from lora_runtime.sampling.constrained import ConstraintKind
from lora_runtime.sampling.finish import FinishReason, finish_after
from lora_runtime.sampling.stops import StopChecker
from lora_runtime.sampling.tokens import SampledToken, TokenLogprob
from lora_runtime.types import Request, TokenSequence

CONTEXT = 64  # tokens of prompt and answer together
EOS = 0
LOGPROB = -0.5


class FakeText:
    """The text of one sample: a character a token."""

    def append(self, token_id: int) -> str:
        return "" if token_id == EOS else chr(token_id)

    def flush(self) -> str:
        return ""


class FakeMask:
    """A constraint that the fake does not follow, but that a test can ask for."""

    def __init__(self, kind: ConstraintKind, text: str) -> None:
        self.kind, self.text = kind, text


class FakeTextGeneration:
    """A tokenizer of characters, without special tokens but EOS."""

    eos_token_ids = frozenset({EOS})
    vocab_size = 0x110000

    def encode_prompts(self, prompts: Sequence[str | Chat], *, max_length: int | None) -> tuple[TokenSequence, ...]:
        return tuple(self._encode(index, prompt, self._limit(max_length)) for index, prompt in enumerate(prompts))

    def room(self, sequence: TokenSequence, max_length: int | None = None) -> int:
        return self._limit(max_length) - sequence.num_tokens

    def new_text(self) -> FakeText:
        return FakeText()

    def compile(self, kind: ConstraintKind, text: str) -> Callable[[], Any]:
        if kind is ConstraintKind.JSON_SCHEMA:
            try:
                json.loads(text)
            except ValueError:
                raise InvalidRequest("constraint.json_schema", "is not JSON") from None
        return lambda: FakeMask(kind, text)

    def _encode(self, index: int, prompt: str | Chat, limit: int) -> TokenSequence:
        is_text = isinstance(prompt, str)
        field = f"inputs[{index}].{'text' if is_text else 'messages'}"
        text = prompt if is_text else "".join(f"{message.role}:{message.content}\n" for message in prompt.messages)
        if not text:
            raise InvalidRequest(field, "is empty")
        if len(text) >= limit:
            raise TextTooLong(field, len(text), limit - 1)
        return TokenSequence(tuple(map(ord, text)), None)

    @staticmethod
    def _limit(max_length: int | None) -> int:
        return min(max_length or CONTEXT, CONTEXT)


class FakeSample:
    """One sample on its way."""

    def __init__(self, generation: Generation, sequence: int, sample: int, prompt: TokenSequence) -> None:
        self._generation, self._place = generation, (sequence, sample)
        params = generation.params
        limit = min(CONTEXT, generation.max_length or CONTEXT)
        self._room = min(params.max_new_tokens, limit - prompt.num_tokens)
        once = [*prompt.input_ids[sample:], min(generation.eos_token_ids)]
        self._coming: Iterator[int] = iter(itertools.cycle(once[:-1]) if params.ignore_eos else once)
        self._text, self._stops = generation.new_text(), StopChecker(params.stop, include_stop=params.include_stop)
        self._texts: list[str] = []
        self._tokens: list[SampledToken] = []
        self.end: Sample | None = None

    def step(self) -> None:
        """One token more, unless it has ended."""
        if self.end is not None:
            return
        params = self._generation.params
        token = _sampled(next(self._coming), params.logprobs)
        self._tokens.append(token)
        assert token.token_id is not None
        checked = self._stops.feed(self._text.append(token.token_id))
        text, reason = checked.text, FinishReason.STOP_STRING if checked.stop else None
        reason = reason or finish_after(params, token.token_id, len(self._tokens), self._generation.eos_token_ids)
        if reason is None and len(self._tokens) == self._room:
            reason = FinishReason.LENGTH
        if reason is not None and checked.stop is None:
            text += self._stops.feed(self._text.flush()).text + self._stops.flush()
        self._texts.append(text)
        if reason is not None:
            self.end = Sample("".join(self._texts), tuple(self._tokens), reason, checked.stop)
        if self._generation.on_delta is not None:
            self._generation.on_delta(Delta(*self._place, text, (token,)))


class FakeDecoding:
    """What one request generates, a token of each sample a step."""

    def __init__(self, request: Request) -> None:
        generation = request.generation
        assert generation is not None
        self._samples = [
            [FakeSample(generation, index, sample, sequence) for sample in range(generation.params.n)]
            for index, sequence in enumerate(request.sequences)
        ]

    def step(self) -> tuple[Generated, ...] | None:
        """The answer, once all samples have ended."""
        for sample in itertools.chain.from_iterable(self._samples):
            sample.step()
        ends = [[sample.end for sample in samples] for samples in self._samples]
        if any(end is None for own in ends for end in own):
            return None
        return tuple(Generated(tuple(end for end in own if end), 1, 0.001) for own in ends)


def _sampled(token_id: int, logprobs: int | None) -> SampledToken:
    if logprobs is None:
        return SampledToken(token_id)
    return SampledToken(token_id, LOGPROB, tuple(TokenLogprob(token_id + k, LOGPROB - k) for k in range(logprobs)))
