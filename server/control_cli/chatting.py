"""`multilora chat`: a conversation, a line a message."""

from __future__ import annotations

import sys

import typer

from server.control_cli.client import Client, ControlError
from server.control_cli.generating import show
from server.control_cli.output import note
from server.pb.multilora.v1 import inference_pb2 as pb

_PROMPT = "> "


def converse(client: Client, request: pb.GenerateRequest, system: str | None, *, as_json: bool) -> None:
    """Answer each line of standard input until its end. Raises grpc.RpcError when a reply is refused.

    A reply that Ctrl-C stopped stays out of the conversation, as does what it answered.
    """
    (conversation,) = (request.inputs.add(),)
    if system is not None:
        conversation.messages.add(role="system", content=system)
    if sys.stdin.isatty():
        note("Ctrl-C stops a reply, Ctrl-D ends")
    while (line := _line()) is not None:
        if not line.strip():
            continue
        conversation.messages.add(role="user", content=line)
        try:
            reply = show(client, request, as_json=as_json)
        except KeyboardInterrupt:
            note("stopped; it and your message are left out of the conversation")
            del conversation.messages[-1]
            continue
        conversation.messages.add(role="assistant", content=reply)


def _line() -> str | None:
    """The next message, None at the end. Ctrl-C on a terminal drops what was typed."""
    while True:
        try:
            return input(_PROMPT) if sys.stdin.isatty() else _piped()
        except EOFError:
            if sys.stdin.isatty():
                typer.echo(err=True)  # ends the line of the prompt
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            typer.echo(err=True)
        except UnicodeDecodeError:
            raise ControlError("standard input is not UTF-8") from None


def _piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
