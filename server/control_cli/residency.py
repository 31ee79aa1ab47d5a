"""`load`, `unload`, `pin` and `unpin`: what is in device memory."""

from __future__ import annotations

from typing import Annotated
from uuid import uuid4

import typer

from server.control_cli import options, output
from server.control_cli.client import connect
from server.control_cli.options import DEFAULT_SERVER, QUICK_S, SLOW_S
from server.control_cli.output import bytes_and_mib, print_reply, short_name
from server.pb.multilora.v1 import adapters_pb2


def load(
    name: options.Adapter,
    wait: Annotated[bool, typer.Option(help="Wait until it is loaded or refused.")] = True,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    as_json: options.Json = False,
) -> None:
    """Load an adapter into device memory, so that its first request does not wait."""
    with connect("load", server, timeout) as client:
        request = adapters_pb2.LoadAdapterRequest(adapter=name, wait=wait)
        reply = client.call(client.stub.LoadAdapter, request)
        print_reply(reply, output.loaded(reply.adapter), as_json)


def unload(
    name: options.Adapter,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = QUICK_S,
    as_json: options.Json = False,
) -> None:
    """Take an adapter out of memory; it stays registered, and its next request loads it again."""
    with connect("unload", server, timeout) as client:
        reply = client.call(client.stub.UnloadAdapter, adapters_pb2.UnloadAdapterRequest(adapter=name))
        freed = f"freed {bytes_and_mib(reply.freed_bytes)} of device memory"
        if reply.freed_host_bytes:
            freed += f", {bytes_and_mib(reply.freed_host_bytes)} of host memory"
        print_reply(reply, f"unloaded {short_name(reply.adapter.name)}; {freed}", as_json)


def pin(
    name: options.Adapter,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    as_json: options.Json = False,
) -> None:
    """Load an adapter and keep it in device memory until it is unpinned."""
    _pin("pin", name, server, timeout, as_json)


def unpin(
    name: options.Adapter,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = QUICK_S,
    as_json: options.Json = False,
) -> None:
    """Let a pinned adapter be evicted again."""
    _pin("unpin", name, server, timeout, as_json)


def _pin(command: str, name: str, server: str, timeout_s: float, as_json: bool) -> None:
    with connect(command, server, timeout_s) as client:
        pinned = command == "pin"
        request = adapters_pb2.PinAdapterRequest(adapter=name, pinned=pinned, request_id=str(uuid4()))
        reply = client.call(client.stub.PinAdapter, request)
        adapter = reply.adapter
        kept = f"pinned; it keeps {bytes_and_mib(adapter.resident_bytes)} of device memory"
        text = kept if pinned else "unpinned; it may be evicted again"
        print_reply(reply, f"{short_name(adapter.name)} is {text}", as_json)
