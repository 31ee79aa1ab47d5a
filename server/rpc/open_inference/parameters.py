"""Parameters of a request, into the fields of our own messages that have their names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from lora_runtime.errors import InvalidRequest
from server.pb.open_inference import grpc_service_pb2 as pb

_IGNORED = "triton_"  # what clients of Triton's dialect add by themselves
_INTEGERS = frozenset({FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64})
_REALS = frozenset({FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT})


def check_known(place: str, names: Iterable[str], known: Iterable[str], whose: str) -> None:
    """Raise InvalidRequest on the first parameter that is not known; those of Triton's own always are."""
    allowed = sorted(known)
    for name in names:
        if name not in allowed and not name.startswith(_IGNORED):
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise InvalidRequest(f"{place}.{name[:64]}", f"is no parameter of {whose}; {takes}")


def set_fields(parameters: Mapping[str, pb.InferParameter], targets: Mapping[str, Message]) -> None:
    """Set each field that is given in the message that `targets` has for its name.

    Raises InvalidRequest on `parameters.{name}` for one that is not known or not of the field's type.
    """
    check_known("parameters", parameters, targets, "this model's task")
    for name in sorted(parameters.keys() & targets.keys()):
        _set(targets[name], name, parameters[name])


def flag(parameters: Mapping[str, pb.InferParameter], name: str) -> bool:
    """Whether a parameter is given and true."""
    return name in parameters and parameters[name].bool_param


def integer(place: str, parameter: pb.InferParameter) -> int:
    """Raises InvalidRequest on `place`."""
    value = _plain(parameter)
    try:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        return int(value)
    except ValueError:
        raise InvalidRequest(place, "is not an integer") from None


def _set(message: Message, name: str, parameter: pb.InferParameter) -> None:
    place, field = f"parameters.{name}", message.DESCRIPTOR.fields_by_name[name]
    oneof = field.containing_oneof
    if oneof is not None and (other := message.WhichOneof(oneof.name)) is not None:
        raise InvalidRequest(place, f"is given with {other}; give one of them")
    try:
        if field.is_repeated:
            getattr(message, name).extend(_list(place, field, parameter))
        else:
            setattr(message, name, _value(place, field, parameter))
    except (TypeError, ValueError):  # of protobuf: out of the field's range, or no text
        raise InvalidRequest(place, "is out of range") from None


def _value(place: str, field: Any, parameter: pb.InferParameter) -> Any:
    value = _plain(parameter)
    if field.type in _INTEGERS:
        return integer(place, parameter)
    if field.type in _REALS:
        return _real(place, value)
    wanted, called = (bool, "true or false") if field.type == FieldDescriptor.TYPE_BOOL else (str, "a text")
    if not isinstance(value, wanted):
        raise InvalidRequest(place, f"is not {called}")
    return value if field.enum_type is None else _enum_value(place, field.enum_type, str(value))


def _real(place: str, value: Any) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (OverflowError, ValueError):
        raise InvalidRequest(place, "is not a number") from None


def _enum_value(place: str, enum: Any, text: str) -> int:
    """By the value's name without the prefix that all have, in lower case."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    known = {value.name.removeprefix(prefix).lower(): value.number for value in enum.values if value.number}
    if text not in known:
        raise InvalidRequest(place, f"{text[:64]!r} is none of {', '.join(known)}")
    return known[text]


def _list(place: str, field: Any, parameter: pb.InferParameter) -> list[Any]:
    """A JSON list; of texts also one text alone."""
    wanted = str if field.type == FieldDescriptor.TYPE_STRING else int
    text = parameter.string_param
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list):
        if wanted is str and text:
            return [text]
        raise InvalidRequest(place, "is not a JSON list")
    if not all(isinstance(value, wanted) and not isinstance(value, bool) for value in values):
        raise InvalidRequest(place, f"is not a JSON list of {'texts' if wanted is str else 'integers'}")
    return values


def _plain(parameter: pb.InferParameter) -> bool | int | float | str | None:
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)
