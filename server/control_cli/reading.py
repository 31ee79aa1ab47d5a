"""`list`, `show` and `watch`: commands that change nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from server.control_cli import options, output, tables
from server.control_cli.client import Client, ControlError, connect
from server.control_cli.options import DEFAULT_SERVER, QUICK_S
from server.control_cli.output import console_for_people
from server.control_cli.watch import changes, line_of
from server.pb.multilora.v1 import adapters_pb2, common_pb2

_PAGE = 200
_STATES = ", ".join(output.words_of(adapters_pb2.AdapterState))
_TASKS = ", ".join(output.words_of(common_pb2.Task))
_RESUME_S = 300.0


def list_adapters(
    tenant: options.Tenant = "",
    all_tenants: options.AllTenants = False,
    state: Annotated[str, typer.Option(metavar="STATE", help=f"Only in this state: {_STATES}.")] = "",
    task: Annotated[str, typer.Option(metavar="TASK", help=f"Only for this task: {_TASKS}.")] = "",
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Only names that begin so.")] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, max=options.MAX_INT32, help="Most versions to list. Default: all.")
    ] = None,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = QUICK_S,
    as_json: options.Json = False,
) -> None:
    """List the adapters the server knows, a row a version; refused ones with the reason."""
    with connect("list", server, timeout) as client:
        request = adapters_pb2.ListAdaptersRequest(
            tenant=_tenant(tenant, all_tenants),
            name_prefix=prefix,
            state=output.number_of(adapters_pb2.AdapterState, state, "--state"),
            task=output.number_of(common_pb2.Task, task, "--task"),
        )
        adapters, is_cut = _all_pages(client, request, limit)
        if as_json:
            output.print_json({"adapters": [output.as_dict(adapter) for adapter in adapters]})
        elif adapters:
            console = console_for_people()
            tables.print_table(console, adapters)
            console.print(tables.summary(adapters, is_cut=is_cut), markup=False)
        else:
            typer.echo(_none(request))


def show(
    name: options.Adapter,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = QUICK_S,
    as_json: options.Json = False,
) -> None:
    """Say all that is known of one adapter version, and where the aliases of its adapter lead."""
    with connect("show", server, timeout) as client:
        reply = client.call(client.stub.GetAdapter, adapters_pb2.GetAdapterRequest(adapter=name))
        if as_json:
            output.print_json(reply)
        else:
            tables.print_facts(console_for_people(), reply)


def watch(
    tenant: options.Tenant = "",
    all_tenants: options.AllTenants = False,
    snapshot: Annotated[bool, typer.Option(help="Begin with what there is.")] = True,
    server: options.Server = DEFAULT_SERVER,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to try again when the connection breaks.")
    ] = _RESUME_S,
    as_json: options.Json = False,
) -> None:
    """Print every change as it happens, a line each, until Ctrl-C; a broken connection is resumed."""
    with connect("watch", server, timeout) as client:
        try:
            console = console_for_people()
            for message in changes(client, _tenant(tenant, all_tenants), snapshot=snapshot):
                if as_json:
                    output.print_json(message, one_line=True)
                else:
                    console.print(line_of(message), soft_wrap=True)
        except KeyboardInterrupt:  # the usual end
            raise typer.Exit(0) from None


def _tenant(tenant: str, all_tenants: bool) -> str:
    if tenant and all_tenants:
        raise ControlError("--tenant and --all-tenants exclude each other; give one")
    return "-" if all_tenants else tenant


def _all_pages(
    client: Client, request: adapters_pb2.ListAdaptersRequest, limit: int | None
) -> tuple[list[adapters_pb2.Adapter], bool]:
    """The adapters of all pages, and whether `limit` cut some off."""
    adapters = list[adapters_pb2.Adapter]()
    while True:
        request.page_size = _PAGE if limit is None else min(_PAGE, limit - len(adapters))
        page = client.call(client.stub.ListAdapters, request)
        adapters.extend(page.adapters)
        if not page.next_page_token or (limit is not None and len(adapters) >= limit):
            return adapters[:limit], bool(page.next_page_token)
        request.page_token = page.next_page_token


def _none(request: adapters_pb2.ListAdaptersRequest) -> str:
    if request.name_prefix or request.state or request.task:
        return "no adapter is like that; without --state, --task and --prefix all are listed"
    where = {"": "", "-": " of any tenant"}.get(request.tenant, f" of tenant {request.tenant}")
    return f"no adapters{where} yet; add one: multilora adapters register NAME SOURCE, or upload NAME FOLDER"
