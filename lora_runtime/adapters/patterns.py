"""`rank_pattern` and `alpha_pattern`: regular expressions from a file that nobody vouches for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import regex  # pyright: ignore[reportMissingTypeStubs]  # unlike re, it gives up after a while

from lora_runtime.errors import AdapterRejected

V = TypeVar("V", int, float)

MAX_PATTERNS = 10_000
MAX_PATTERN_CHARS = 1000
MATCHING_SECONDS = 5.0  # of one table, in all


class PatternTable(Generic[V]):
    """Values by patterns of module paths; it raises AdapterRejected, naming `field` of `file`, for what it refuses."""

    def __init__(self, file: str, field: str, values: Mapping[str, V]) -> None:
        self._where = f"{file} field {field}"
        self._seconds_left = MATCHING_SECONDS
        if len(values) > MAX_PATTERNS:
            raise AdapterRejected("CONFIG_INVALID", self._where, f"has more than {MAX_PATTERNS} patterns")
        self._values = [(self._compile(pattern), value) for pattern, value in values.items()]

    def lookup(self, module: str, default: V) -> V:
        """PEFT's rule: the first pattern, in file order, that matches a suffix of the module path."""
        deadline = time.monotonic() + self._seconds_left
        try:
            for pattern, value in self._values:
                if pattern.match(module, timeout=max(deadline - time.monotonic(), 0.001)):
                    return value
        except TimeoutError as error:
            message = f"takes more than {MATCHING_SECONDS:g} s to match; use plain module names"
            raise AdapterRejected("CONFIG_INVALID", self._where, message) from error
        finally:
            self._seconds_left = deadline - time.monotonic()
        return default

    def _compile(self, pattern: str) -> Any:
        if len(pattern) > MAX_PATTERN_CHARS:
            message = f"has a pattern of {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}"
            raise AdapterRejected("CONFIG_INVALID", self._where, message)
        try:
            return regex.compile(rf"(.*\.)?({pattern})$")  # PEFT's get_pattern_key
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            message = f"{pattern!r} is not a regular expression ({type(error).__name__}: {error})"
            raise AdapterRejected("CONFIG_INVALID", self._where, message) from error
