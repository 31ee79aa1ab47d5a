"""Tokens to text as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

_REPLACEMENT = "\ufffd"
_MAX_HELD = 3  # tokens of one byte each that the next may make one character
_MAX_TOKENS = 8  # decoded again for each new one


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + k): byte for k, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


class Detokenizer:
    """What all sequences share of one fast tokenizer (`PreTrainedTokenizerFast.backend_tokenizer`)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.is_byte_level = isinstance(tokenizer.decoder, ByteLevel)
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    def is_text(self, token_id: int) -> bool:
        """Whether a token is part of the text: neither special nor unknown to the tokenizer."""
        return token_id not in self._special and self.tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token of a byte-level tokenizer, as its decoder has them."""
        token = self.tokenizer.id_to_token(token_id) or ""
        values = [_BYTES.get(character) for character in token]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else token.encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)


class TokenText:
    """The text of one sequence's generated tokens, in pieces that join to `decode(ids, skip_special_tokens=True)`.

    A character is sent once its last byte is there. Bytes that are no UTF-8 become U+FFFD, as the decoder has it;
    where a byte-fallback tokenizer writes such bytes straight after a character made of bytes, that character is
    sent, though the decoder would replace it too. Work per token is bounded whatever the length of the text.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if detokenizer.is_byte_level else None
        self._context: list[int] = []  # the tokens sent last: decoders look at what comes before
        self._pending: list[int] = []
        self._num_held = 0  # the last of them that end in a part of a character

    def append(self, token_id: int) -> str:
        """Take a token; the text that is sure now, "" where a character is not complete."""
        if not self._detokenizer.is_text(token_id):
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._detokenizer.token_bytes(token_id))
        self._pending = [*self._pending, token_id][-_MAX_TOKENS:]
        text = self._pending_text()
        if not text:  # kept: a leading space that a decoder drops shows that the next one is not leading
            return ""
        if text.endswith(_REPLACEMENT) and self._num_held < _MAX_HELD:
            self._num_held += 1
            return ""
        self._context, self._pending, self._num_held = self._pending, [], 0
        return text

    def flush(self) -> str:
        """What is left at the end: the bytes of a character that was never completed, as U+FFFD."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        text = self._pending_text()
        self._context, self._pending = self._context + self._pending, []
        return text

    def _pending_text(self) -> str:
        decode = self._detokenizer.decode
        return decode(self._context + self._pending)[len(decode(self._context)) :]
