"""`alias` and `delete`: where names lead, and versions that go."""

from __future__ import annotations

import sys
from typing import Annotated
from uuid import uuid4

import typer

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterRef
from server.control_cli import options
from server.control_cli.client import Client, ControlError, connect
from server.control_cli.failure import REFUSED
from server.control_cli.options import DEFAULT_SERVER, QUICK_S, SLOW_S
from server.control_cli.output import bytes_and_mib, print_reply, short_name
from server.control_cli.tables import alias_target
from server.pb.multilora.v1 import adapters_pb2

_Version = Annotated[
    int | None,
    typer.Argument(metavar="VERSION", min=1, max=options.MAX_INT32, show_default=False, help="Where it should lead."),
]


def alias(
    name: options.AdapterName,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as prod, or default: what NAME alone means.")],
    version: _Version = None,
    canary: Annotated[
        int | None, typer.Option(min=1, max=options.MAX_INT32, help="Version that gets a share of the requests.")
    ] = None,
    percent: Annotated[float | None, typer.Option(help="That share, more than 0 and less than 100.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Lead back to where it was before.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    as_json: options.Json = False,
) -> None:
    """Move an alias to a version, which is loaded first; or take the move back, or the alias away."""
    with connect("alias", server, timeout) as client:
        if (version is not None) + rollback + remove != 1:
            raise ControlError("give a VERSION, --rollback or --remove, and only one of them")
        if (canary is None) != (percent is None) or (canary is not None and version is None):
            raise ControlError("--canary and --percent go together, with the VERSION that gets the rest")
        if remove:
            _remove(client, name, alias, as_json)
            return
        request = adapters_pb2.SetAliasRequest(adapter=name, alias=alias, rollback=rollback, request_id=str(uuid4()))
        request.version, request.canary_version, request.canary_percent = version or 0, canary or 0, percent or 0.0
        reply = client.call(client.stub.SetAlias, request)
        text = f"{short_name(reply.alias.name)} leads to {alias_target(reply.alias)}"
        print_reply(reply, text, as_json)


def delete(
    name: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version, with TENANT/ before it or not.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = QUICK_S,
    as_json: options.Json = False,
) -> None:
    """Forget one adapter version, and remove its files if they were uploaded."""
    with connect("delete", server, timeout) as client:
        _check_version(name)
        if not yes:
            _confirm(name)
        request = adapters_pb2.DeleteAdapterRequest(adapter=name, request_id=str(uuid4()))
        reply = client.call(client.stub.DeleteAdapter, request)
        freed = f"freed {bytes_and_mib(reply.freed_bytes)} of device memory"
        if reply.freed_host_bytes:
            freed += f", {bytes_and_mib(reply.freed_host_bytes)} of host memory"
        if reply.freed_disk_bytes:
            freed += f", {bytes_and_mib(reply.freed_disk_bytes)} of disk"
        print_reply(reply, f"deleted {short_name(name)}; {freed}", as_json)


def is_interactive() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def _remove(client: Client, name: str, alias: str, as_json: bool) -> None:
    request = adapters_pb2.DeleteAliasRequest(adapter=name, alias=alias, request_id=str(uuid4()))
    reply = client.call(client.stub.DeleteAlias, request)
    print_reply(reply, f"removed the alias {alias} of {name}", as_json)


def _check_version(name: str) -> None:
    try:
        version = AdapterRef.parse(name).version
    except InvalidRequest as error:
        raise ControlError(error.description) from None
    if version is None:
        remedy = "write NAME@VERSION (multilora adapters list shows the versions)"
        raise ControlError(f"{name!r} names no version, and only versions are deleted; {remedy}")


def _confirm(name: str) -> None:
    if not is_interactive():
        raise ControlError("nobody is there to confirm this; add --yes to delete without being asked")
    try:
        is_meant = typer.confirm(f"delete {short_name(name)}?", err=True)
    except typer.Abort:
        typer.echo(err=True)  # ends the line of the question
        is_meant = False
    if not is_meant:
        raise ControlError("nothing was deleted", REFUSED)
