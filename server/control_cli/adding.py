"""`register` and `upload`: new versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer

from lora_runtime.errors import shown
from server.control_cli import options, output
from server.control_cli import upload as sending
from server.control_cli.client import Client, connect
from server.control_cli.options import DEFAULT_SERVER, SLOW_S
from server.pb.multilora.v1 import adapters_pb2

_MAX_SKIPPED = 10

Added = adapters_pb2.RegisterAdapterResponse | adapters_pb2.UploadAdapterResponse


def register(
    name: options.AdapterName,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder under the server's adapter root, or a URL it allows.")
    ],
    version: options.Version = None,
    load: options.Load = False,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    as_json: options.Json = False,
) -> None:
    """Register a version of an adapter whose files the server can reach."""
    with connect("register", server, timeout) as client:
        request = adapters_pb2.RegisterAdapterRequest(
            name=name, version=version, source=source, request_id=str(uuid4())
        )
        _finish(client, client.call(client.stub.RegisterAdapter, request), load, as_json)


def upload(
    name: options.AdapterName,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The adapter's folder on this machine.")],
    version: options.Version = None,
    load: options.Load = False,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    as_json: options.Json = False,
) -> None:
    """Send an adapter's folder to the server and register it; pickles are never sent."""
    with connect("upload", server, timeout) as client:
        _finish(client, send(client, name, folder, version), load, as_json)


def send(client: Client, name: str, folder: Path, version: int | None = None) -> adapters_pb2.UploadAdapterResponse:
    """Upload a folder's files of an adapter, telling which; raises ControlError and grpc.RpcError."""
    selection = sending.select_files(folder)
    output.note(f"sending {', '.join(selection.sent)}")
    if selection.skipped:
        more = len(selection.skipped) - _MAX_SKIPPED
        skipped = ", ".join(selection.skipped[:_MAX_SKIPPED]) + (f", and {more} more" if more > 0 else "")
        output.note(f"skipped {skipped}: no files of an adapter")
    header = adapters_pb2.UploadHeader(name=name, version=version, request_id=str(uuid4()))
    return sending.upload(client, header, folder, selection)


def load_and_wait(client: Client, name: str) -> adapters_pb2.LoadAdapterResponse:
    """Load an adapter; it is READY when this returns. Raises grpc.RpcError when it is refused."""
    return client.call(client.stub.LoadAdapter, adapters_pb2.LoadAdapterRequest(adapter=name, wait=True))


def _finish(client: Client, reply: Added, load: bool, as_json: bool) -> None:
    """Say what was registered, load it where that is asked for, and say how that went."""
    adapter = reply.adapter
    short = output.short_name(adapter.name)
    if not as_json:
        hint = "" if load else f"; load it: multilora adapters load {short}"
        typer.echo(f"registered {short} from {shown(adapter.source)}{hint}")
    answer: Added | adapters_pb2.LoadAdapterResponse = reply
    try:
        if load:
            answer = load_and_wait(client, adapter.name)
            if not as_json:
                typer.echo(output.loaded(answer.adapter))
    finally:
        if as_json:  # it stays registered when the load fails
            output.print_json(answer)
