"""Regular expressions from a file that nobody vouches for: matched with a time limit.

`rank_pattern` and `alpha_pattern` give values by them; `target_modules` and its kin may be one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import regex  # pyright: ignore[reportMissingTypeStubs]  # unlike re, it gives up after a while

from lora_runtime.errors import AdapterRejected

V = TypeVar("V", int, float)

MAX_PATTERNS = 10_000
MAX_PATTERN_CHARS = 1000
MATCHING_SECONDS = 5.0  # of one field, in all


class Patterns:
    """The patterns of one field of a file; raises AdapterRejected, naming both, for what it refuses."""

    def __init__(self, file: str, field: str) -> None:
        self._where = f"{file} field {field}"
        self._seconds_left = MATCHING_SECONDS

    def compile(self, pattern: str, template: str = "{}", max_chars: int = MAX_PATTERN_CHARS) -> Any:
        """`pattern` within `template`."""
        if len(pattern) > max_chars:
            message = f"has a pattern of {len(pattern)} characters, the limit is {max_chars}"
            raise AdapterRejected("CONFIG_INVALID", self._where, message)
        try:
            return regex.compile(template.replace("{}", pattern, 1))
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            message = f"{pattern!r} is not a regular expression ({type(error).__name__}: {error})"
            raise AdapterRejected("CONFIG_INVALID", self._where, message) from error

    def match(self, pattern: Any, text: str, *, whole: bool = False) -> Any:
        """The match at the start of `text`, or of all of it; None without one."""
        deadline = time.monotonic() + self._seconds_left
        try:
            matching = pattern.fullmatch if whole else pattern.match
            return matching(text, timeout=max(self._seconds_left, 0.001))
        except TimeoutError as error:
            message = f"takes more than {MATCHING_SECONDS:g} s to match; use plain module names"
            raise AdapterRejected("CONFIG_INVALID", self._where, message) from error
        finally:
            self._seconds_left = deadline - time.monotonic()

    def refuse_more_than(self, count: int) -> None:
        """Raise AdapterRejected when `count` patterns are too many."""
        if count > MAX_PATTERNS:
            raise AdapterRejected("CONFIG_INVALID", self._where, f"has more than {MAX_PATTERNS} patterns")


class PatternTable(Generic[V]):
    """Values by patterns of module paths."""

    def __init__(self, file: str, field: str, values: Mapping[str, V]) -> None:
        self._patterns = Patterns(file, field)
        self._patterns.refuse_more_than(len(values))
        template = r"(.*\.)?({})$"  # PEFT's get_pattern_key
        self._values = [(self._patterns.compile(pattern, template), value) for pattern, value in values.items()]

    def lookup(self, module: str, default: V) -> V:
        """PEFT's rule: the first pattern, in file order, that matches a suffix of the module path."""
        for pattern, value in self._values:
            if self._patterns.match(pattern, module):
                return value
        return default
