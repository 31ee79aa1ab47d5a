"""Output that a JSON schema or a regular expression allows, by llguidance (github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from lora_runtime.errors import InvalidRequest
from lora_runtime.sampling.row import Bitmask

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_SCHEMA_BYTES = 64 * 1024
MAX_REGEX_BYTES = 4 * 1024
MAX_COMPILED = 64  # distinct constraints kept compiled per tokenizer
_MAX_REASON_CHARS = 200
_WHITESPACE = r"[\x20\x0A\x09]{1,8}"  # between JSON's tokens; without an end a model may never stop


class ConstraintKind(StrEnum):
    """What the text of a constraint is; the value is the field of a request that brings it."""

    JSON_SCHEMA = "json_schema"  # the output is one JSON value that validates
    REGEX = "regex"  # the whole output matches; the syntax is that of Rust's crate `regex`, without look-around


class Constraint:
    """The grammar's state in one sequence, a `LogitsMask`. EOS is allowed when the output may end, and only then."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> Bitmask:
        """No bits are set once the grammar exceeds its limits, so that the sampler reports a row without a token."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.zeros_like(bits) if self._matcher.is_error() else bits

    def accept(self, token_id: int) -> None:
        """`token_id` is one of `allowed`; EOS only ends the output."""
        self._matcher.consume_token(token_id)

    @property
    def is_accepting(self) -> bool:
        """Whether the output so far is complete: it may end here."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why nothing is allowed any more: a limit of the grammar's work per token, or a token it does not allow."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None

    def copy(self) -> Constraint:
        """An independent constraint in the same state."""
        return Constraint(self._matcher.deep_copy())


class ConstraintCompiler:
    """Compiles constraints for one tokenizer and keeps the last `max_compiled` of them. Safe to share by threads.

    `vocab_size` is that of the logits, at least the tokenizer's. Making one takes about a second for a large
    vocabulary. Without llguidance the first use raises InvalidRequest with the extra to install.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        max_compiled: int = MAX_COMPILED,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._max_compiled = max_compiled
        self._compiled: OrderedDict[tuple[ConstraintKind, str], Constraint] = OrderedDict()
        self._shared: Any = None  # the LLTokenizer, made at the first use
        self._lock = Lock()

    def compile(self, kind: ConstraintKind, text: str) -> Constraint:
        """A constraint at its start, independent of all others.

        Raises InvalidRequest on `constraint.json_schema` or `constraint.regex` with the reason when the text is too
        large, is not valid, or asks for what llguidance does not support; nothing is left out silently.
        """
        _check_size(kind, text)
        with self._lock:
            key = (kind, text)
            if key not in self._compiled:
                self._compiled[key] = self._compile(kind, text)
            self._compiled.move_to_end(key)
            if len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
            return self._compiled[key].copy()

    @property
    def num_compiled(self) -> int:
        return len(self._compiled)

    def _compile(self, kind: ConstraintKind, text: str) -> Constraint:
        field = f"constraint.{kind}"
        try:
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer
        except ImportError:
            remedy = "this server has no llguidance; install it with pip install 'multilora[constrained]'"
            raise InvalidRequest(field, remedy) from None
        if self._shared is None:
            plain = Tokenizer.from_str(self._tokenizer.to_str())
            plain.no_padding()
            plain.no_truncation()
            self._shared = LLTokenizer(plain.to_str(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        if kind is ConstraintKind.JSON_SCHEMA:
            _check_json(field, text)
            # overrides, so that a schema's own "x-guidance" changes neither; lenient would leave out unknown keywords
            grammar = LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": _WHITESPACE, "lenient": False}
            )
        else:
            grammar = LLMatcher.grammar_from_regex(text)
        limits = LLParserLimits(verbose_errors=False)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._shared, limits=limits)
        if is_error:
            raise InvalidRequest(field, f"cannot be compiled: {_reason(messages[0])}")
        return Constraint(LLMatcher(self._shared, grammar, log_level=0, limits=limits))


def _check_size(kind: ConstraintKind, text: str) -> None:
    limit = MAX_SCHEMA_BYTES if kind is ConstraintKind.JSON_SCHEMA else MAX_REGEX_BYTES
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"constraint.{kind}", "has a lone surrogate, which is no character") from None
    if not 1 <= num_bytes <= limit:
        raise InvalidRequest(f"constraint.{kind}", f"has {num_bytes} bytes; it takes 1 to {limit}")


def _check_json(field: str, text: str) -> None:
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise InvalidRequest(field, problem) from None
    except RecursionError:
        raise InvalidRequest(field, "is nested too deeply") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(field, "is not a JSON object")


def _reason(message: str) -> str:
    """What is wrong, in one line: llguidance's parse errors quote the text first and name the error last."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("error: ")]
    reason = named[0].removeprefix("error: ") if named else lines[0]
    return reason[:_MAX_REASON_CHARS]
