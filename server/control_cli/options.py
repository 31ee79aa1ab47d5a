"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_SERVER = "127.0.0.1:50051"
QUICK_S = 30.0  # what the server answers from memory
SLOW_S = 600.0  # what reads, sends or loads files
MAX_INT32 = 2**31 - 1

Server = Annotated[str, typer.Option(envvar="MULTILORA_SERVER", metavar="HOST:PORT", help="The running server.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for an answer.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Tenant = Annotated[str, typer.Option(metavar="TENANT", help="Another tenant's adapters.", show_default=False)]
AllTenants = Annotated[bool, typer.Option("--all-tenants", help="The adapters of all tenants.")]
Load = Annotated[bool, typer.Option("--load", help="Load it as well, and wait for that.")]
Version = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_INT32, help="Version to register. Default: one more than the highest there is."),
]

Adapter = Annotated[
    str, typer.Argument(metavar="NAME", help="NAME, NAME@VERSION or NAME@ALIAS, each also with TENANT/ before it.")
]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="NAME or TENANT/NAME, without a version.")]

TokenFile = Annotated[
    Path | None,
    typer.Option(envvar="MULTILORA_TOKEN_FILE", help="File with a key or token; or set MULTILORA_TOKEN to it."),
]
Tls = Annotated[bool, typer.Option("--tls", envvar="MULTILORA_TLS", help="Talk TLS to the server.")]
TlsCa = Annotated[
    Path | None, typer.Option(envvar="MULTILORA_CA", help="PEM file of the CA of the server's certificate.")
]
TlsCert = Annotated[Path | None, typer.Option(envvar="MULTILORA_CLIENT_CERT", help="PEM file of a client certificate.")]
TlsKey = Annotated[Path | None, typer.Option(envvar="MULTILORA_CLIENT_KEY", help="PEM file of its private key.")]
