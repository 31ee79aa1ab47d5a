"""`--publish`: a finished adapter goes to a running server. The options and the steps, for all commands that write one.

gRPC is imported when something is published.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints
from uuid import uuid4

import typer

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterRef
from server.control_cli import options
from server.control_cli.given import Given, given
from server.control_cli.options import DEFAULT_SERVER, SLOW_S

if TYPE_CHECKING:  # brings gRPC
    from server.control_cli.client import Client

FAILED = 1
PANEL = "Publishing"


Publish = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[@ALIAS]",
        help="Then upload it to a running server as a new version of NAME or TENANT/NAME, wait until it is ready, and"
        " move the alias to it.",
    ),
]


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a finished adapter goes."""

    name: str  # with its tenant before it or not, without a version
    alias: str | None
    server: str
    timeout_s: float
    credentials: Given

    def publish(self, command: str, folder: Path) -> None:
        """Upload, load, move the alias; says how that goes.

        Leaves by typer.Exit, 1, when the server is not reached or refuses: the adapter stays in its folder.
        """
        from server.control_cli import adding, output  # gRPC
        from server.control_cli.client import INTERRUPTED, connection
        from server.control_cli.failure import LATE_CHANGE

        given.set(self.credentials)
        registered: str | None = None
        try:
            with connection(command, self.server, self.timeout_s, LATE_CHANGE) as client:
                adapter = adding.send(client, self.name, folder).adapter
                registered = output.short_name(adapter.name)
                typer.echo(f"published {registered} to {self.server}")
                typer.echo(output.loaded(adding.load_and_wait(client, adapter.name).adapter))
                if self.alias is not None:
                    self._move_alias(client, self.alias, adapter.version)
        except typer.Exit as error:
            for line in self._remedy(folder, registered):
                typer.echo(line, err=True)
            raise typer.Exit(error.exit_code if error.exit_code == INTERRUPTED else FAILED) from None

    def _move_alias(self, client: Client, alias: str, version: int) -> None:
        from server.control_cli import output
        from server.control_cli.tables import alias_target
        from server.pb.multilora.v1 import adapters_pb2

        request = adapters_pb2.SetAliasRequest(adapter=self.name, alias=alias, version=version, request_id=str(uuid4()))
        moved = client.call(client.stub.SetAlias, request).alias
        typer.echo(f"{output.short_name(moved.name)} leads to {alias_target(moved)}")

    def _remedy(self, folder: Path, registered: str | None) -> list[str]:
        """How to do later what was not done."""
        at = f" --server {self.server}"
        if registered is None:
            lines = [f"the adapter stays in {folder}; when that is mended, publish it:"]
            lines.append(f"  multilora adapters upload {self.name} {folder} --load{at}")
            version = "VERSION"
        else:
            lines = [f"the adapter stays in {folder}, and the server has it as {registered}; when that is mended:"]
            lines.append(f"  multilora adapters load {registered}{at}")
            version = registered.rpartition("@")[2]
        if self.alias is not None:
            lines.append(f"  multilora adapters alias {self.name} {self.alias} {version}{at}")
        return lines


def publish_options(
    publish: Publish = None,
    server: options.Server = DEFAULT_SERVER,
    publish_timeout: options.Timeout = SLOW_S,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
) -> Publication | None:
    """From the values of the options, None where nothing is published; raises InvalidRequest on `publish`."""
    if publish is None:
        return None
    try:
        ref = AdapterRef.parse(publish)
    except InvalidRequest as error:
        raise InvalidRequest("publish", error.description) from None
    if ref.version is not None:
        raise InvalidRequest("publish", f"{publish!r} names a version, and the server gives the next one; leave it out")
    name, at, _ = publish.partition("@")
    if publish.startswith("tenants/") and publish.count("/") > 1:
        raise InvalidRequest("publish", f"is {publish!r}; write NAME or TENANT/NAME, with @ALIAS or not")
    credentials = Given(token_file=token_file, tls=tls, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
    return Publication(name, ref.alias if at else None, server, publish_timeout, credentials)


def publish_hints() -> dict[str, Any]:
    """The annotations of `publish_options`, whose options have a heading of their own in a command's help."""
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(publish_options, include_extras=True).items():
        if name != "return":
            kind, found = get_args(hint)
            option = copy.copy(found)
            option.rich_help_panel = PANEL
            hints[name] = Annotated[kind, option]
    return hints


def publishes(own: Callable[..., None]) -> Callable[..., None]:
    """A command that writes an adapter's folder `out`, with the options to publish it when that is done."""
    signature, publishing = inspect.signature(own), inspect.signature(publish_options).parameters
    hints = {**get_type_hints(own, include_extras=True), **publish_hints()}

    def command(**values: Any) -> None:
        try:
            publication = publish_options(**{name: values.pop(name) for name in publishing})
        except InvalidRequest as error:
            typer.echo(f"error: {error.message}", err=True)
            raise typer.Exit(FAILED) from None
        own(**values)
        if publication is not None:
            publication.publish(own.__name__, values["out"])

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in (*signature.parameters.values(), *publishing.values())
    ]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess] - PEP 362
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__, command.__name__ = own.__doc__, own.__name__
    return command
