"""Watching adapters: changes as they come, across broken connections."""

from __future__ import annotations

import time
from collections.abc import Generator
from datetime import datetime

import grpc

from server.control_cli import output
from server.control_cli.client import PAUSES_S, Client, ControlError
from server.control_cli.failure import NOT_REACHABLE, Failure
from server.control_cli.output import note, plain
from server.control_cli.tables import alias_target
from server.pb.multilora.v1 import adapters_pb2

_MAX_PAUSE_S = 5.0
_LASTING_S = 10.0  # a stream that was open this long was connected, also when nothing changed


class _Patience:
    """Decides whether a broken stream is opened again.

    As often as any call before the server spoke once; after that until the client's timeout is over.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._was_connected = False
        self._limit_s = sum(PAUSES_S)
        self._reset()

    def connected(self) -> None:
        self._was_connected = True
        self._limit_s = self._client.timeout_s
        self._reset()

    def wait(self, failure: Failure | None) -> None:
        """Pause before the next try; `failure` is None when the stream ended. Raises ControlError when it is no use."""
        now = time.monotonic()
        if self._broken_at is None:
            self._broken_at = now
            if self._was_connected:
                note(_why(self._client.server, failure))
        if now - self._broken_at >= self._limit_s:
            raise self._end(failure)
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)

    def _reset(self) -> None:
        self._pause_s = PAUSES_S[0]
        self._broken_at: float | None = None

    def _end(self, failure: Failure | None) -> ControlError:
        server = self._client.server
        if failure is None:
            return ControlError(f"{server} ends every stream at once", NOT_REACHABLE)
        return ControlError(failure.told(server, self._limit_s, self._client.uses_tls), failure.exit_code)


def changes(client: Client, tenant: str, *, snapshot: bool) -> Generator[adapters_pb2.WatchAdaptersResponse]:
    """What there is, unless `snapshot` is false, then every change; a stream that breaks is resumed by its token.

    Raises grpc.RpcError, and ControlError when the server is gone for good.
    """
    token, is_new = "", True
    patience = _Patience(client)
    while True:
        failure, opened = None, time.monotonic()
        stream = client.stub.WatchAdapters(adapters_pb2.WatchAdaptersRequest(tenant=tenant, resume_token=token))
        is_first = True
        try:
            for message in stream:
                patience.connected()
                if is_first and token and not message.resume_token:
                    note("the server cannot tell what happened meanwhile; what there is now follows")
                is_first = False
                token = message.resume_token or token
                if snapshot or not is_new:
                    yield message
                is_new = is_new and message.WhichOneof("change") != "snapshot_complete"
        except grpc.RpcError as error:
            failure = Failure.of(error)
            if not failure.is_break:
                raise
        if time.monotonic() - opened > _LASTING_S:
            patience.connected()
        patience.wait(failure)


def line_of(message: adapters_pb2.WatchAdaptersResponse) -> str:
    """One change as a line of a console, with the local time."""
    return f"[dim]{datetime.now().astimezone():%H:%M:%S}[/]  {_text(message)}"


def _text(message: adapters_pb2.WatchAdaptersResponse) -> str:
    match message.WhichOneof("change"):
        case "adapter":
            return _adapter_text(message.adapter)
        case "deleted_adapter":
            return f"{plain(output.short_name(message.deleted_adapter))}  [red]deleted[/]"
        case "alias":
            return f"{plain(output.short_name(message.alias.name))}  leads to {plain(alias_target(message.alias))}"
        case "deleted_alias":
            return f"{plain(output.short_name(message.deleted_alias))}  [red]alias removed[/]"
        case "snapshot_complete":
            return "[dim]that is what there is; changes follow[/]"
        case _:
            return "[dim]a change this version of the command does not know[/]"


def _adapter_text(adapter: adapters_pb2.Adapter) -> str:
    facts = [output.coloured_state(output.state_of(adapter))]
    if adapter.HasField("failure"):
        facts.append(f"[red]{plain(output.failure_of(adapter))}[/]")
    if adapter.resident_bytes:
        facts.append(output.mib(adapter.resident_bytes))
    if adapter.pinned:
        facts.append("pinned")
    return f"{plain(output.short_name(adapter.name))}  {'  '.join(facts)}"


def _why(server: str, failure: Failure | None) -> str:
    if failure is not None and failure.code is grpc.StatusCode.ABORTED:
        return f"{server} ended the stream: {failure.message or 'this reader was too slow'}; resuming"
    if failure is not None and failure.reason:
        return f"{server}: {failure.message}; trying again"
    return f"no connection to {server}; trying again"
