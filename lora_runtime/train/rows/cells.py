"""Checks of single values. Each raises ValueError with the column, what is wrong, and never the text itself."""

from __future__ import annotations

import math

MAX_LABEL_CHARS = 256  # what an adapter's multilora.json takes


def text_of(column: str, value: object) -> str:
    """A string with something in it, as it is."""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {kind_of(value)}, not a string")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    check_encodable(column, value)
    return value


def check_encodable(column: str, value: str) -> None:
    """Refuse half of a surrogate pair: JSON can spell it, tokenizers cannot read it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{column} holds half of a surrogate pair at character {error.start + 1}") from error


def label_of(column: str, value: object) -> str:
    """A label's name: a string, trimmed, or a whole number in JSON, as its digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{column} is {kind_of(value)}, not a string or a whole number")
    name = value.strip()
    if not name:
        raise ValueError(f"{column} is empty")
    if len(name) > MAX_LABEL_CHARS:
        raise ValueError(f"{column} has {len(name)} characters, a label's name has at most {MAX_LABEL_CHARS}")
    check_encodable(column, value)
    return name


def number_of(column: str, value: object) -> float:
    """A finite number, which a string may spell."""
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{column} is empty")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{column} is {kind_of(value)}, not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{column} is {str(value)[:40]!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{column} is {number}, not a finite number")
    return number


def whole_number_of(column: str, value: object) -> int:
    """A whole number, which a string may spell."""
    number = number_of(column, value)
    if number != int(number):
        raise ValueError(f"{column} is {number}, not a whole number")
    return int(number)


def list_of(column: str, value: object) -> list[object]:
    """A list, of anything."""
    if not isinstance(value, list):
        raise ValueError(f"{column} is {kind_of(value)}, not a list")
    return value  # pyright: ignore[reportUnknownVariableType] - a list of whatever JSON holds


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "bool": "a boolean",
        "str": "a string",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, f"of type {type(value).__name__}")
