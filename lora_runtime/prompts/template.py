"""Prompt templates of adapters: fixed text with named fields, such as ``Translate to Chinese: {text}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from lora_runtime.errors import InvalidRequest

MAX_TEMPLATE_CHARS = 16 * 1024
MAX_FIELDS = 32
MAX_FIELD_CHARS = 64


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A parsed template. ``{name}`` is a field, ``{{`` and ``}}`` are braces; there is nothing else to interpret."""

    text: str  # as it was written
    fields: frozenset[str]
    _parts: tuple[tuple[str, str | None], ...]  # literal text, and the field that follows it

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """Raises ValueError, with a remedy, on anything but literal text and 1 to 32 distinct fields.

        A field's name is an identifier of at most 64 characters; conversions, format specifications, attributes,
        indices and positional fields are refused.
        """
        check_text(text)
        parts = tuple(_parts(text))
        fields = frozenset(name for _, name in parts if name is not None)
        if not fields:
            raise ValueError("has no field, so that every prompt would be the same; add one such as {text}")
        if len(fields) > MAX_FIELDS:
            raise ValueError(f"has {len(fields)} fields, the limit is {MAX_FIELDS}")
        return cls(text, fields, parts)

    def render(self, values: Mapping[str, str], place: str) -> str:
        """The template with each field's value in its place, literally: nothing in a value is interpreted.

        Raises InvalidRequest on `{place}.fields` when a field is unknown or missing.
        """
        known = ", ".join(sorted(self.fields))
        if unknown := sorted(values.keys() - self.fields):
            problem = (
                f"{unknown[0][:MAX_FIELD_CHARS]!r} is not in the adapter's prompt template, whose fields are {known}"
            )
            raise InvalidRequest(f"{place}.fields", problem)
        if missing := sorted(self.fields - values.keys()):
            problem = f"{missing[0]!r} is missing; the adapter's prompt template has the fields {known}"
            raise InvalidRequest(f"{place}.fields", problem)
        return "".join(literal if name is None else literal + values[name] for literal, name in self._parts)


def _parts(text: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"is malformed ({error}); write a literal brace twice, as {{{{ or }}}}") from None
    for _, name, spec, conversion in parsed:
        if name is not None:
            _check_field(name, spec, conversion)
    return [(literal, name) for literal, name, _, _ in parsed]


def _check_field(name: str, spec: str | None, conversion: str | None) -> None:
    if conversion is not None or spec:
        raise ValueError(f"field {name!r} has a conversion or a format specification; write {{name}} alone")
    if not name.isidentifier() or len(name) > MAX_FIELD_CHARS:
        problem = "positional fields, attributes and indices are not taken"
        raise ValueError(
            f"field {name[:MAX_FIELD_CHARS]!r} is not a name of at most {MAX_FIELD_CHARS} characters: "
            f"{problem}; write a plain identifier such as {{text}}"
        )


def check_text(text: str) -> None:
    """Raise ValueError when a text of an adapter's is too long, or has a lone surrogate."""
    if len(text) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"has {len(text)} characters, the limit is {MAX_TEMPLATE_CHARS}; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has a lone surrogate at character {error.start}, which no tokenizer takes") from None
