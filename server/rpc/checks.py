"""What is checked of every inference request before anything is spent on it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from lora_runtime.errors import InvalidRequest
from server.rpc.call import CallRequest, RequestT
from server.tenancy.limits import estimate_tokens

_MAX_ROUTING_KEY = 256
MAX_PRIORITY = 3


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one request."""

    max_inputs: int
    max_input_chars: int  # of one text
    max_new_tokens: int  # of one sample


def check_routing(request: CallRequest) -> None:
    """Check what says which version answers, and when; raises InvalidRequest on the field."""
    if len(request.routing_key) > _MAX_ROUTING_KEY:
        length = len(request.routing_key)
        raise InvalidRequest("routing_key", f"has {length} characters, the limit is {_MAX_ROUTING_KEY}")
    if not 0 <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"{request.priority} is not between 0 and {MAX_PRIORITY}")


def check_content(request: RequestT, bounds: Bounds, check: Callable[[RequestT], None]) -> None:
    """Check the inputs, and by its `check` what one call has besides; raises InvalidRequest on the field."""
    _check_num_inputs(len(request.inputs), bounds.max_inputs)
    check(request)
    for index, item in enumerate(request.inputs):
        for field, num_chars in _texts(f"inputs[{index}]", item):
            if num_chars > bounds.max_input_chars:
                problem = f"has {num_chars} characters, the limit is {bounds.max_input_chars}; send it in parts"
                raise InvalidRequest(field, problem, limit=bounds.max_input_chars)


def check_fits(num_sequences: int, max_sequences: int) -> None:
    """Raise InvalidRequest when a request could never be admitted."""
    if num_sequences > max_sequences:
        raise InvalidRequest(
            "inputs",
            f"are {num_sequences} sequences with all windows and samples, the server holds {max_sequences}; send fewer "
            "of them at once, shorter contexts, or ask for fewer samples",
            limit=max_sequences,
        )


def estimated_tokens(request: CallRequest) -> int:
    """The tokens of all texts before they are tokenised."""
    return sum(estimate_tokens(item.ByteSize()) for item in request.inputs)


def _check_num_inputs(num_inputs: int, limit: int) -> None:
    if num_inputs == 0:
        raise InvalidRequest("inputs", "is empty; send at least one text")
    if num_inputs > limit:
        raise InvalidRequest(
            "inputs", f"has {num_inputs} entries, the limit is {limit}; send several requests", limit=limit
        )


def _texts(place: str, message: Message) -> Generator[tuple[str, int]]:
    """Each text of a message, by its place, with its number of characters."""
    for field, value in message.ListFields():
        yield from _texts_of(f"{place}.{field.name}", value)


def _texts_of(place: str, value: Any) -> Generator[tuple[str, int]]:
    if isinstance(value, str):
        yield place, len(value)
    elif isinstance(value, Message):
        yield from _texts(place, value)
    elif isinstance(value, Mapping):  # its keys are a template's fields, which the template knows
        for text in value.values():
            yield place, len(text)
    elif not isinstance(value, int | float | bytes):
        for index, part in enumerate(value):
            yield from _texts_of(f"{place}[{index}]", part)
