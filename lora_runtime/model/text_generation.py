"""What generation needs of one tokenizer: prompts to tokens, tokens to text, ends, and constraints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_runtime.errors import InvalidRequest, TextTooLong
from lora_runtime.model.chat_text import ChatText
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.model.probe import num_positions
from lora_runtime.model.template_process import TemplateProcess
from lora_runtime.prompts.chat import Chat
from lora_runtime.sampling.constrained import ConstraintCompiler, ConstraintKind
from lora_runtime.sampling.detokenize import Detokenizer, TokenText
from lora_runtime.sampling.row import LogitsMask
from lora_runtime.types import TokenSequence


@dataclass(frozen=True, slots=True)
class DecoderFacts:
    """What generation needs of a decoder base."""

    eos_token_ids: frozenset[int]  # those of its generation config, its config and its tokenizer
    vocab_size: int  # width of its logits
    max_length: int  # tokens of prompt and answer together


def decoder_facts(model_config: Any, generation_config: Any, tokenizer: Any) -> DecoderFacts:
    """From the base's transformers config, its generation config (None where it has none) and its tokenizer."""
    text_config = model_config.get_text_config()
    ids = [*_token_ids(generation_config), *_token_ids(text_config), *_token_ids(tokenizer)]
    max_length = min(num_positions(model_config), int(tokenizer.model_max_length))
    return DecoderFacts(frozenset(ids), int(text_config.vocab_size), max_length)


class TextGeneration:
    """Thread-safe. Made by `Encoders.generation_for`.

    `vocab_size` is the width of the logits, which an adapter with an embedding of its own may have changed.
    A token id that ends the base's texts ends those of another tokenizer only where both have the same token there.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        decoder: DecoderFacts,
        *,
        base: TextEncoder,
        renderer: TemplateProcess,
        vocab_size: int | None = None,
    ) -> None:
        tokenizer = encoder.tokenizer
        self.encoder = encoder
        self.vocab_size = decoder.vocab_size if vocab_size is None else vocab_size
        self.max_length = min(encoder.max_length, decoder.max_length)
        self.eos_token_ids = _shared_ends(decoder.eos_token_ids, base.tokenizer, tokenizer) | set(_token_ids(tokenizer))
        self._detokenizer = Detokenizer(tokenizer.backend_tokenizer)
        self._chat = ChatText(encoder, trusted=base.tokenizer, renderer=renderer)
        self._compiler: ConstraintCompiler | None = None
        self._making_compiler = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._chat.template is not None

    def encode_prompts(self, prompts: Sequence[str | Chat], *, max_length: int | None) -> tuple[TokenSequence, ...]:
        """Tokenise prompts; each leaves room for one token at least within `max_length` (None: the base's).

        A text gets the special tokens that the tokenizer adds; a special token's name inside it is that token, as the
        tokenizer parses it. A conversation gets those of the chat template alone, and such a name in it is refused.
        Generation ends where the context does, see `room`.

        On `inputs[i].text`, or `inputs[i].messages` of a conversation, raises TextTooLong when no token fits after the
        prompt, InvalidRequest when it is empty, has a lone surrogate, or the conversation cannot be rendered.
        """
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        chats = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, Chat)}
        rendered = self._chat.render({f"inputs[{i}].messages": chat for i, chat in chats.items()}) if chats else {}
        sequences: list[TokenSequence] = []
        for i, text in enumerate(texts):
            field = f"inputs[{i}].{'messages' if text is None else 'text'}"
            own = rendered[field] if text is None else text
            sequence = self.encoder.encode_text(field, own, add_special_tokens=text is not None)
            self._check_length(field, sequence, max_length)
            sequences.append(sequence)
        return tuple(sequences)

    def room(self, sequence: TokenSequence, max_length: int | None = None) -> int:
        """Tokens that may be generated after `sequence` before the context is full, of the base or of `max_length`."""
        return max(0, self._limit(max_length) - sequence.num_tokens)

    def new_text(self) -> TokenText:
        """The text of one sequence's generated tokens, at its start."""
        return TokenText(self._detokenizer)

    def compile(self, kind: ConstraintKind, text: str) -> Callable[[], LogitsMask]:
        """A factory of masks of a constraint, each at its start and independent of the others.

        Raises InvalidRequest on `constraint.json_schema` or `constraint.regex`, now and not in the factory; so it does
        when the tokenizer is of a kind that llguidance does not know. May take a second at a tokenizer's first
        constraint, so it is no call for an event loop.
        """
        try:
            return self._shared_compiler().compile(kind, text).copy
        except ValueError as error:  # llguidance's, on the tokenizer
            problem = f"this tokenizer's output cannot be constrained ({error}); ask without a constraint"
            raise InvalidRequest(f"constraint.{kind}", problem) from error

    def _shared_compiler(self) -> ConstraintCompiler:
        with self._making_compiler:
            if self._compiler is None:
                tokenizer = self.encoder.tokenizer
                size = max(self.vocab_size, len(tokenizer))
                ends = sorted(self.eos_token_ids)
                self._compiler = ConstraintCompiler(tokenizer.backend_tokenizer, vocab_size=size, eos_token_ids=ends)
            return self._compiler

    def _limit(self, max_length: int | None) -> int:
        return min(self.max_length, max_length or self.max_length)

    def _check_length(self, field: str, sequence: TokenSequence, max_length: int | None) -> None:
        if not sequence.num_tokens:
            raise InvalidRequest(field, "is empty: the tokenizer finds no token in it to go on from")
        limit = self._limit(max_length)
        if sequence.num_tokens >= limit:
            remedy = f"the context is {limit} tokens with at least one to generate; shorten it"
            raise TextTooLong(field, sequence.num_tokens, limit - 1, remedy=remedy)


def _token_ids(holder: Any) -> list[int]:
    """`eos_token_id` of a config or a tokenizer, which may be a number, several, or nothing."""
    found = getattr(holder, "eos_token_id", None)
    if found is None:
        return []
    return [int(found)] if isinstance(found, int) else [int(token_id) for token_id in found]


def _shared_ends(token_ids: frozenset[int], base: Any, tokenizer: Any) -> frozenset[int]:
    if tokenizer is base:
        return token_ids
    names = base.convert_ids_to_tokens, tokenizer.convert_ids_to_tokens
    return frozenset(token_id for token_id in token_ids if names[0](token_id) == names[1](token_id) is not None)
