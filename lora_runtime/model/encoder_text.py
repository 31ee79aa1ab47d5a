"""Texts to token sequences, with the base's own tokenizer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_runtime.errors import InvalidRequest, TextTooLong
from lora_runtime.types import TokenSequence


class TextEncoder:
    """Thread-safe: a fast tokenizer's truncation is mutable state, so each thread has a copy of its own.

    `max_length` is what the base allows, in tokens, special ones included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._local = threading.local()
        self._copying = threading.Lock()

    def encode(
        self, inputs: Sequence[tuple[str, str | None]], *, max_length: int | None, truncate: bool
    ) -> tuple[TokenSequence, ...]:
        """Tokenise (text, pair or None) each; raises TextTooLong on field `inputs[i].text` unless `truncate`.

        InvalidRequest when even truncation leaves more tokens than the adapter allows.
        Truncation takes tokens from the longer of a pair, as transformers' `longest_first`.
        """
        limit = min(self.max_length, max_length or self.max_length)
        tokenizer = self._own()
        sequences: list[TokenSequence] = []
        for i, (text, pair) in enumerate(inputs):
            encoding = tokenizer(text, pair, verbose=False)
            truncated = len(encoding["input_ids"]) > limit
            if truncated:
                if not truncate:
                    raise TextTooLong(f"inputs[{i}].text", len(encoding["input_ids"]), limit)
                encoding = tokenizer(text, pair, truncation="longest_first", max_length=limit)
                if len(encoding["input_ids"]) > limit:  # tokenizers give up where nothing of the text would remain
                    raise InvalidRequest(
                        f"inputs[{i}].text", f"cannot be cut to {limit} tokens: special tokens alone need as many"
                    )
            types = encoding.get("token_type_ids")
            sequences.append(
                TokenSequence(tuple(encoding["input_ids"]), None if types is None else tuple(types), truncated)
            )
        return tuple(sequences)

    def _own(self) -> Any:
        own = getattr(self._local, "tokenizer", None)
        if own is None:
            with self._copying:
                own = self._local.tokenizer = copy.deepcopy(self._tokenizer)
        return own
