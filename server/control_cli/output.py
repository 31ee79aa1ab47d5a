"""Words, numbers and JSON as the commands print them."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape

from lora_runtime.errors import InvalidRequest, shown
from lora_runtime.types import DEFAULT_TENANT, AdapterRef
from server.control_cli.client import ControlError
from server.pb.multilora.v1 import adapters_pb2, common_pb2

_PIPE_WIDTH = 10_000  # nobody folds lines for a program
_COLOURS = {
    "ready": "green",
    "failed": "bold red",
    "fetching": "yellow",
    "copying": "yellow",
    "draining": "magenta",
    "host": "cyan",
}


def console_for_people() -> Console:
    """Standard output; as wide as the terminal, or without a width in a pipe."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=_PIPE_WIDTH)


def note(text: str) -> None:
    """A line on stderr: what is being done."""
    typer.echo(shown(text), err=True)


def as_dict(message: Message) -> dict[str, Any]:
    """The proto's JSON mapping: names as in the proto, 64-bit numbers as strings, nothing left out."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_json(message: Message | dict[str, Any], *, one_line: bool = False) -> None:
    """In ASCII, so that any pipe takes it."""
    content = as_dict(message) if isinstance(message, Message) else message
    typer.echo(json.dumps(content, indent=None if one_line else 2))


def print_reply(reply: Message, text: str, as_json: bool) -> None:
    """The answer for a machine, or in words."""
    if as_json:
        print_json(reply)
    else:
        typer.echo(shown(text))


def plain(text: str) -> str:
    """Text of others for a console: no markup, and no control codes of a terminal."""
    return escape(shown(text))


def short_name(resource: str) -> str:
    """`tenants/T/adapters/A/versions/V` as people write it: `A@V`, with `T/` before it unless it is the default."""
    try:
        ref = AdapterRef.parse(resource)
    except InvalidRequest:
        return shown(resource)
    path = ref.name if ref.tenant == DEFAULT_TENANT else f"{ref.tenant}/{ref.name}"
    return f"{path}@{ref.alias if ref.version is None else ref.version}"


def state_of(adapter: adapters_pb2.Adapter) -> str:
    return _word(adapters_pb2.AdapterState, adapter.state)


def task_of(adapter: adapters_pb2.Adapter) -> str:
    return _word(common_pb2.Task, adapter.task)


def problem_type_of(adapter: adapters_pb2.Adapter) -> str:
    return _word(common_pb2.ProblemType, adapter.problem_type)


def pooling_of(adapter: adapters_pb2.Adapter) -> str:
    return _word(common_pb2.Pooling, adapter.pooling)


def coloured_state(state: str) -> str:
    colour = _COLOURS.get(state)
    return state if colour is None else f"[{colour}]{state}[/]"


def loaded(adapter: adapters_pb2.Adapter) -> str:
    """How a load went, or how far it is."""
    short, state = short_name(adapter.name), state_of(adapter)
    if state != "ready":
        return f"{short} is {state}; multilora adapters show {short} tells how it goes"
    took = f", loaded in {adapter.load_seconds:.3g} s" if adapter.HasField("load_seconds") else ""
    return f"{short} is ready: {mib(adapter.resident_bytes)} of device memory{took}"


def failure_of(adapter: adapters_pb2.Adapter) -> str:
    """Why it is refused, and what happens next."""
    failure = adapter.failure
    remedy = "the next request tries again" if failure.retryable else "mend it and load it again"
    return f"{failure.reason}: {failure.message} ({remedy})"


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def bytes_and_mib(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes ({mib(num_bytes)})" if num_bytes else "0 bytes"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def words_of(enum: Any) -> list[str]:
    """Its values as people write them, without the one that means none."""
    return [_word(enum, number) for number in sorted(enum.values()) if number]


def number_of(enum: Any, word: str, option: str) -> Any:
    """The value that `word` means, none for an empty one; raises ControlError for any other."""
    numbers = {"": 0} | {_word(enum, number): number for number in enum.values() if number}
    if word.lower() not in numbers:
        raise ControlError(f"{option}: {word!r} is not one of {', '.join(words_of(enum))}")
    return numbers[word.lower()]


def _word(enum: Any, number: int) -> str:
    """`ADAPTER_STATE_READY` as `ready`; a value of a newer server as its number, none as nothing."""
    if not number:
        return ""
    if number not in enum.values():
        return str(number)
    return enum.Name(number).removeprefix(enum.Name(0).removesuffix("UNSPECIFIED")).lower()
