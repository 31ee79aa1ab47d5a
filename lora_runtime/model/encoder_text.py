"""Texts to token sequences, with the base's own tokenizer or an adapter's; where each token lies in its text."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_runtime.errors import InvalidRequest, TextTooLong
from lora_runtime.model.offsets import Range, number_words, tidy_ranges
from lora_runtime.types import TokenSequence

MIN_CONTEXT_TOKENS = 16  # a window with room for less of a long context answers nothing
MAX_DEFAULT_OVERLAP = 128  # tokens; longer than the answers that an overlap is there to keep whole


@dataclass(frozen=True, slots=True)
class TokenText:
    """One tokenised text, and where its tokens lie in it: one entry per token, None for special ones.

    `offsets` are code points without white space at the ends; a token of white space alone has an empty range.
    `word_ids` count words from 0: the tokenizer's, cut where those are larger (see `number_words`).
    """

    sequence: TokenSequence
    offsets: tuple[Range | None, ...]
    word_ids: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A question with a piece of its context; `offsets` are code points of the whole context, None elsewhere."""

    sequence: TokenSequence
    offsets: tuple[Range | None, ...]
    null_index: int | None  # the token where "no answer" is scored: CLS, else BOS; None where the tokenizer adds none


class TextEncoder:
    """Thread-safe: a fast tokenizer's truncation is mutable state, so each thread has a copy of its own.

    `max_length` is what the base allows, in tokens, special ones included. A text with a lone surrogate, which no
    tokenizer takes, raises InvalidRequest on its field.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._local = threading.local()
        self._copying = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        """For its facts: vocabulary, special tokens, templates. Encoding with it is not thread-safe."""
        return self._tokenizer

    def with_tokenizer(self, tokenizer: Any) -> TextEncoder:
        """An encoder for the same base with another tokenizer, which from now on makes the inputs the base's makes.

        The RoBERTa family has one token type: a tokenizer that numbers a pair 0 and 1 would point outside its table.
        """
        tokenizer.model_input_names = list(self._tokenizer.model_input_names)
        return TextEncoder(tokenizer, self.max_length)

    def encode(
        self, inputs: Sequence[tuple[str, str | None]], *, max_length: int | None, truncate: bool
    ) -> tuple[TokenSequence, ...]:
        """Tokenise (text, pair or None) each; raises TextTooLong on field `inputs[i].text` unless `truncate`.

        InvalidRequest when even truncation leaves more tokens than the adapter allows.
        Truncation takes tokens from the longer of a pair, as transformers' `longest_first`.
        """
        limit = self._limit(max_length)
        return tuple(
            _sequence(*self._encoding(i, text, pair, limit, truncate, offsets=False))
            for i, (text, pair) in enumerate(inputs)
        )

    def encode_text(self, field: str, text: str, *, add_special_tokens: bool) -> TokenSequence:
        """Tokenise one text that came in `field`, whatever its length and even where it has no tokens."""
        check_encodable(field, text)
        return _sequence(self._own()(text, add_special_tokens=add_special_tokens, verbose=False), truncated=False)

    def encode_tokens(self, texts: Sequence[str], *, max_length: int | None, truncate: bool) -> tuple[TokenText, ...]:
        """Tokenise each text, with the place of every token; errors and truncation as in `encode`."""
        limit = self._limit(max_length)
        tokenised: list[TokenText] = []
        for i, text in enumerate(texts):
            encoding, truncated = self._encoding(i, text, None, limit, truncate, offsets=True)
            own = [k for k, part in enumerate(encoding.sequence_ids(0)) if part is not None]
            ranges = tidy_ranges(text, [encoding["offset_mapping"][k] for k in own])
            words = encoding.word_ids(0)
            numbers = number_words(text, ranges, [words[k] for k in own])
            num_tokens = len(encoding["input_ids"])
            tokenised.append(
                TokenText(
                    _sequence(encoding, truncated), _spread(own, ranges, num_tokens), _spread(own, numbers, num_tokens)
                )
            )
        return tuple(tokenised)

    def encode_questions(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        max_length: int | None,
        doc_stride: int | None = None,
        max_windows: int = 64,
    ) -> tuple[tuple[Window, ...], ...]:
        """Tokenise (question, context) each, in that order; a long context is cut into windows that overlap.

        `doc_stride` is the tokens neighbours share, at most half of a window's room for context; None: a quarter of
        it, at most 128. Every token of the context is in a window, and each window's sequence is what the tokenizer
        makes of the pair with `truncation="only_second"`. Raises InvalidRequest on `inputs[i].question` when it is
        empty or leaves no sensible room, on `inputs[i].context` when it is empty or needs more than `max_windows`.
        """
        if doc_stride is not None and doc_stride < 0:
            raise InvalidRequest("doc_stride", f"{doc_stride} is negative; give the tokens that windows share")
        limit = self._limit(max_length)
        cut: list[tuple[Window, ...]] = []
        for i, (question, context) in enumerate(pairs):
            pair = self._pair(i, question, context)
            room = limit - (len(pair.input_ids) - pair.num_context)
            if room < min(pair.num_context, MIN_CONTEXT_TOKENS):
                message = f"has {pair.num_question} tokens, which leaves room for {max(room, 0)} of its context within "
                raise InvalidRequest(f"inputs[{i}].question", f"{message}{limit}; shorten it")
            starts = _window_starts(pair.num_context, room, doc_stride)
            if len(starts) > max_windows:
                message = f"needs {len(starts)} windows of {room} tokens, the limit is {max_windows}; shorten it"
                raise InvalidRequest(f"inputs[{i}].context", message)
            cut.append(tuple(pair.window(start, min(start + room, pair.num_context)) for start in starts))
        return tuple(cut)

    def _limit(self, max_length: int | None) -> int:
        return min(self.max_length, max_length or self.max_length)

    def _encoding(
        self, i: int, text: str, pair: str | None, limit: int, truncate: bool, *, offsets: bool
    ) -> tuple[Any, bool]:
        """The tokenizer's result for one input, within `limit` tokens, and whether it was truncated to that."""
        field = f"inputs[{i}].text"
        check_encodable(field, text)
        check_encodable(f"inputs[{i}].text_pair", pair or "")
        tokenizer = self._own()
        encoding = tokenizer(text, pair, return_offsets_mapping=offsets, verbose=False)
        num_tokens = len(encoding["input_ids"])
        if num_tokens <= limit:
            return encoding, False
        if not truncate:
            raise TextTooLong(field, num_tokens, limit)
        encoding = tokenizer(
            text, pair, return_offsets_mapping=offsets, truncation="longest_first", max_length=limit, verbose=False
        )
        if len(encoding["input_ids"]) > limit:  # tokenizers give up where nothing of the text would remain
            raise InvalidRequest(field, f"cannot be cut to {limit} tokens: special tokens alone need as many")
        return encoding, True

    def _pair(self, i: int, question: str, context: str) -> _Pair:
        for name, text in (("question", question), ("context", context)):
            check_encodable(f"inputs[{i}].{name}", text)
        tokenizer = self._own()
        encoding = tokenizer(question, context, return_offsets_mapping=True, verbose=False)
        parts = encoding.sequence_ids(0)
        for part, (name, text) in enumerate((("question", question), ("context", context))):
            if part not in parts or not text.strip():
                raise InvalidRequest(f"inputs[{i}].{name}", "is empty: the tokenizer finds no text in it")
        own = [k for k, part in enumerate(parts) if part == 1]
        ranges = tidy_ranges(context, [encoding["offset_mapping"][k] for k in own])
        return _Pair(
            input_ids=encoding["input_ids"],
            token_type_ids=encoding.get("token_type_ids"),
            ranges=ranges,
            first=own[0],
            num_question=parts.count(0),
            null_index=_null_index(tokenizer, encoding["input_ids"], parts),
        )

    def _own(self) -> Any:
        own = getattr(self._local, "tokenizer", None)
        if own is None:
            with self._copying:
                own = self._local.tokenizer = copy.deepcopy(self._tokenizer)
        return own


@dataclass(frozen=True, slots=True)
class _Pair:
    """A question and its whole context, tokenised as one; the context's tokens are one run from `first`."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    ranges: list[Range]  # of the context's tokens
    first: int
    num_question: int  # tokens, without special ones
    null_index: int | None

    @property
    def num_context(self) -> int:
        return len(self.ranges)

    def window(self, start: int, stop: int) -> Window:
        """The pair with the context's tokens `start` to `stop` alone; what stands around the context stays."""
        head, tail = self.first, self.first + self.num_context
        cut, types, null = slice(head + start, head + stop), self.token_type_ids, self.null_index
        ids = (*self.input_ids[:head], *self.input_ids[cut], *self.input_ids[tail:])
        kept_types = None if types is None else (*types[:head], *types[cut], *types[tail:])
        after = len(self.input_ids) - tail
        if null is not None and null >= tail:  # XLNet's CLS is the last token
            null -= self.num_context - (stop - start)
        offsets = (*(None,) * head, *self.ranges[start:stop], *(None,) * after)
        return Window(TokenSequence(ids, kept_types), offsets, null)


def _window_starts(num_context: int, room: int, doc_stride: int | None) -> range:
    """First context token of each window; the last window ends with the context."""
    overlap = min(room // 4, MAX_DEFAULT_OVERLAP) if doc_stride is None else min(doc_stride, room // 2)
    step = room - overlap
    return range(0, max(num_context - overlap, 1), step)


def _null_index(tokenizer: Any, input_ids: list[int], parts: list[int | None]) -> int | None:
    """The first special token that is CLS, else BOS: where training scripts put the span of "no answer"."""
    for wanted in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if wanted is not None:
            for k, (token, part) in enumerate(zip(input_ids, parts, strict=True)):
                if part is None and token == wanted:
                    return k
    return None


def _sequence(encoding: Any, truncated: bool) -> TokenSequence:
    types = encoding.get("token_type_ids")
    return TokenSequence(tuple(encoding["input_ids"]), None if types is None else tuple(types), truncated)


def _spread(own: list[int], values: list[Any], num_tokens: int) -> tuple[Any, ...]:
    """`values` at the places `own` of a sequence, None elsewhere."""
    placed = dict(zip(own, values, strict=True))
    return tuple(placed.get(k) for k in range(num_tokens))


def check_encodable(field: str, text: str) -> None:
    """Raise InvalidRequest when `text`, which came in `field`, has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"has a lone surrogate at character {error.start}, which no tokenizer takes; send valid Unicode"
        raise InvalidRequest(field, message) from None
