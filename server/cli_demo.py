"""`multilora demo`: from data to three adapters answered by one server, in one command."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

demo_app = typer.Typer(add_completion=False)


@demo_app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running at the end, until Ctrl-C.")] = False,
    threads: Annotated[int | None, typer.Option(help="torch threads. Default: the cores, at most 8.", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of the mixed stream.", min=1, max=600)] = 8.0,
    port: Annotated[int | None, typer.Option(help="gRPC port. Default: any free one.", min=1, max=65535)] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep adapters and logs here (must not exist). Default: a temporary folder.")
    ] = None,
) -> None:
    """Train three small adapters, serve them together, and show what a mixed stream costs.

    Needs no network: the encoder and the texts are packaged.
    """
    console = Console()
    try:
        from server.bench.measure import OutputsDiffer
        from server.bench.texts import default_base
        from server.demo.process import ServerDidNotStart
        from server.demo.run import default_threads, run_demo

        base = default_base()
    except ModuleNotFoundError as error:
        console.print(f"[red]{error.name} is not installed:[/] pip install '.\\[demo]' in the repository")
        raise typer.Exit(1) from error
    if folder is not None:
        if folder.exists():
            raise typer.BadParameter(f"{folder} exists already; name a new one", param_hint="--folder")
        folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="multilora-demo-") as scratch:
        try:
            run_demo(base, folder or Path(scratch), threads or default_threads(), seconds, port, keep, console)
        except (OutputsDiffer, ServerDidNotStart) as error:
            console.print(f"[red]{error}[/]")
            raise typer.Exit(1) from error
