"""Calls to a running server: retries that are harmless, and every error as one line and an exit code.

Exit codes: 0 done, 1 refused by the server, 2 the command is wrong, 3 the server is not reachable, 130 interrupted.
"""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import grpc
import typer

from lora_runtime.errors import shown
from server.control_cli.credentials import Credentials, CredentialsError
from server.control_cli.failure import LATE_CHANGE, REFUSED, Failure
from server.control_cli.given import given
from server.pb.multilora.v1 import adapters_pb2_grpc, inference_pb2_grpc

Reply = TypeVar("Reply")

WRONG, INTERRUPTED = 2, 130
PAUSES_S = (0.2, 0.4, 0.8)  # before each further try of a call that found no server
_MAX_TIMEOUT_S = 86_400
_TARGET = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s/:\[\]]+):(\d{1,5})")
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),  # a page of adapters with thousands of labels each
    ("grpc.initial_reconnect_backoff_ms", 100),  # else a further try within a second fails unasked
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one connection may take
    ("grpc.keepalive_time_ms", 330_000),  # notices a server that vanished; servers allow a ping every five minutes
)


class ControlError(Exception):
    """Ends the command with this line on stderr and this exit code."""

    def __init__(self, message: str, exit_code: int = WRONG) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


class Client:
    """One server: its control plane, and its inference."""

    def __init__(self, channel: grpc.Channel, server: str, timeout_s: float, uses_tls: bool) -> None:
        self.stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.server = server
        self.timeout_s = timeout_s
        self.uses_tls = uses_tls

    def call(self, method: Callable[..., Reply], request: Any) -> Reply:
        """The answer to `request`, which is sent again, as it is, while the server cannot be reached.

        Raises grpc.RpcError.
        """
        return self.retry(lambda timeout_s: method(request, timeout=timeout_s))

    def retry(self, attempt: Callable[[float], Reply]) -> Reply:
        """Make an attempt, and up to three more after UNAVAILABLE; each is told how many seconds are left."""
        deadline = time.monotonic() + self.timeout_s
        for pause_s in PAUSES_S:
            try:
                return attempt(deadline - time.monotonic())
            except grpc.RpcError as error:
                is_late = time.monotonic() + pause_s >= deadline
                if is_late or Failure.of(error).code is not grpc.StatusCode.UNAVAILABLE:
                    raise
            time.sleep(pause_s)
        return attempt(deadline - time.monotonic())


def connect(command: str, server: str, timeout_s: float) -> AbstractContextManager[Client]:
    """As `connection` for a command of `multilora adapters`."""
    return connection(f"adapters {command}", server, timeout_s, LATE_CHANGE)


@contextmanager
def connection(command: str, server: str, timeout_s: float, late: str) -> Generator[Client]:
    """A client for one command; whatever goes wrong inside ends the program with one line on stderr.

    `late` is the remedy when there is no answer within `timeout_s`.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a label may have letters that the terminal's encoding lacks
    credentials = Credentials(**(given.get() or {}))
    try:
        _check(server, timeout_s)
        with credentials.channel(server, _OPTIONS) as channel:
            yield Client(channel, server, timeout_s, credentials.uses_tls)
    except grpc.RpcError as error:
        failure = Failure.of(error)
        end(command, failure.told(server, timeout_s, credentials.uses_tls, late), failure.exit_code)
    except ControlError as error:
        end(command, error.message, error.exit_code)
    except CredentialsError as error:
        end(command, str(error), WRONG)
    except UnicodeEncodeError as error:
        end(command, f"{str(error.object)[:200]!r} is not valid UTF-8", WRONG)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of a pipe went away; typer ends that quietly
            raise
        end(command, str(error), REFUSED)
    except KeyboardInterrupt:
        end(command, "interrupted", INTERRUPTED)


def end(command: str, message: str, exit_code: int) -> None:
    """Say why on stderr, in one line, and exit."""
    typer.echo(f"multilora {command}: {shown(message)}", err=True)
    raise typer.Exit(exit_code) from None


def _check(server: str, timeout_s: float) -> None:
    match = _TARGET.fullmatch(server)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ControlError(f"--server: {server!r} is not HOST:PORT, such as 127.0.0.1:50051")
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise ControlError(f"--timeout: {timeout_s:g} is not more than 0 and at most {_MAX_TIMEOUT_S} seconds")
