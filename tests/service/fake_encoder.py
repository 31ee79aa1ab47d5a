"""A tokenizer without a vocabulary: words, or what `_` leaves of them, are tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_runtime.errors import InvalidRequest, TextTooLong
from lora_runtime.model.encoder_text import TokenText, Window
from lora_runtime.types import TokenSequence

MAX_LENGTH = 16
_PIECE = re.compile(r"_?[^\s_]+")


class FakeEncoder:
    """An id is the sum of a token's characters without `_`. Two special tokens with id 0 surround a text.

    `by_character` stands for another tokenizer: each character is a token.
    """

    def __init__(self, *, by_character: bool = False) -> None:
        self._pattern = re.compile(r"\S") if by_character else _PIECE

    def encode(
        self, inputs: Sequence[tuple[str, str | None]], *, max_length: int | None, truncate: bool
    ) -> tuple[TokenSequence, ...]:
        texts = [f"{text} {pair or ''}" for text, pair in inputs]
        return tuple(item.sequence for item in self.encode_tokens(texts, max_length=max_length, truncate=truncate))

    def encode_tokens(self, texts: Sequence[str], *, max_length: int | None, truncate: bool) -> tuple[TokenText, ...]:
        limit = _limit(max_length)
        return tuple(self._encode(index, text, limit, truncate) for index, text in enumerate(texts))

    def encode_questions(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        max_length: int | None,
        doc_stride: int | None = None,
        max_windows: int = 64,
    ) -> tuple[tuple[Window, ...], ...]:
        """Windows share one token unless `doc_stride` says otherwise, and at most half of their room."""
        cut: list[tuple[Window, ...]] = []
        for index, (question, context) in enumerate(pairs):
            head = (0, *self._ids(question), 0)
            pieces = self._pieces(context)
            room = _limit(max_length) - len(head) - 1
            if room < 2:
                raise InvalidRequest(f"inputs[{index}].question", "leaves no room for its context; shorten it")
            stride = min(1 if doc_stride is None else doc_stride, room // 2)
            if not pieces:
                raise InvalidRequest(f"inputs[{index}].context", "is empty: the tokenizer finds no text in it")
            starts = range(0, max(len(pieces) - stride, 1), room - stride)
            if len(starts) > max_windows:
                raise InvalidRequest(f"inputs[{index}].context", f"needs {len(starts)} windows")
            cut.append(tuple(_window(head, pieces[start : start + room]) for start in starts))
        return tuple(cut)

    def _encode(self, index: int, text: str, limit: int, truncate: bool) -> TokenText:
        pieces = self._pieces(text)
        num_tokens = len(pieces) + 2
        if num_tokens > limit and not truncate:
            raise TextTooLong(f"inputs[{index}].text", num_tokens, limit)
        kept = pieces[: limit - 2]
        words: list[int] = []
        for piece in kept:
            starts_word = piece.start() == 0 or text[piece.start() - 1].isspace()
            words.append((words[-1] if words else -1) + starts_word)
        ids = (0, *(_id(piece[0]) for piece in kept), 0)
        return TokenText(
            TokenSequence(ids, None, truncated=num_tokens > limit),
            (None, *(piece.span() for piece in kept), None),
            (None, *words, None),
        )

    def _pieces(self, text: str) -> list[re.Match[str]]:
        return [*self._pattern.finditer(text)]

    def _ids(self, text: str) -> list[int]:
        return [_id(piece[0]) for piece in self._pieces(text)]


def _id(token: str) -> int:
    return sum(map(ord, token.replace("_", "")))


def _limit(max_length: int | None) -> int:
    return min(max_length or MAX_LENGTH, MAX_LENGTH)


def _window(head: tuple[int, ...], pieces: Sequence[re.Match[str]]) -> Window:
    ids = (*head, *(_id(piece[0]) for piece in pieces), 0)
    offsets = (*(None for _ in head), *(piece.span() for piece in pieces), None)
    return Window(TokenSequence(ids, None), offsets, null_index=0)
