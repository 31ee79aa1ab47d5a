"""`multilora adapters …`: what can be asked about adapters from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup
from typer.main import get_command

from lora_runtime.errors import MultiloraError
from server.control_cli import options
from server.control_cli.given import given

if TYPE_CHECKING:  # brings torch
    from lora_runtime.adapters.base_spec import BaseSpec
    from lora_runtime.adapters.inspect import Inspection, ModuleReport


class _Group(TyperGroup):
    """`inspect` is here; the commands that need a running server, and gRPC, are imported when one is used or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_control().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _control().get_command(ctx, cmd_name)


def _control() -> Any:
    from server.control_cli.commands import control_app

    return get_command(control_app)


adapters_app = typer.Typer(
    cls=_Group,
    help="Examine adapter folders, and manage the adapters of a running server.",
    no_args_is_help=True,
    add_completion=False,
)

_LAYER = r"(?<=\.)\d+(?=\.)"  # its number in a module path
_MAX_LABELS = 12
_MAX_PROBLEMS = 12
_MIN_WIDTH = 110  # module paths are long: a pipe or a narrow terminal wraps them, and loses nothing


@adapters_app.callback()
def _group(  # pyright: ignore[reportUnusedFunction] - typer's
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
) -> None:
    """Examine adapter folders, and manage the adapters of a running server.

    What shows who you are comes before the command: multilora adapters --token-file key.txt --tls-ca ca.pem list
    """
    given.set({"token_file": token_file, "tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key})


@adapters_app.command(no_args_is_help=True)
def inspect(
    path: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    base: Annotated[
        str | None, typer.Option(help="Check it against this base: a folder, a GGUF file, or a name on the hub.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Say what a PEFT folder is, and whether it would be served; no server is needed.

    Without --base only the folder itself is checked: whether it fits a base is then not known.

    Exit code 0: loadable. 1: not loadable. 2: the command itself is wrong.
    """
    spec = None if base is None else _load_base(base)
    from lora_runtime.adapters.inspect import inspect_adapter  # seconds of torch, for this command alone

    report = inspect_adapter(path, spec)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        console = Console()
        console.width = max(console.width, _MIN_WIDTH)
        _print(console, report)
    raise typer.Exit(0 if report.loadable else 1)


def _load_base(base: str) -> BaseSpec:
    from lora_runtime.model.load import load_base

    try:
        return load_base(base, prepack=False).spec
    except MultiloraError as error:
        typer.echo(f"multilora adapters inspect: --base: {error.message}", err=True)
        raise typer.Exit(2) from error


def _print(console: Console, report: Inspection) -> None:
    console.print(f"[bold]{escape(report.folder)}[/]", highlight=False)
    for name, value in _facts(report):
        console.print(f"  {name:<11} {escape(value)}", highlight=False, soft_wrap=True)
    if report.modules:
        console.print(_modules_table(report.modules))
    if report.head:
        head = ", ".join(f"{name} {list(shape)}" for name, shape in report.head.items())
        console.print(f"  {'head':<11} {escape(head)}", highlight=False, soft_wrap=True)
    for warning in report.warnings:
        console.print(f"  [yellow]warning[/]     {escape(warning)}", highlight=False, soft_wrap=True)
    for text in _problems(report):
        console.print(f"  [red]problem[/]     {escape(text)}", highlight=False, soft_wrap=True)
    console.print(_verdict(report), highlight=False, soft_wrap=True)


def _problems(report: Inspection) -> list[str]:
    """A line a problem; those that differ by the layer alone share one."""
    kinds: dict[str, int] = {}
    for problem in report.problems:
        text = f"{problem.code}: {re.sub(_LAYER, '*', problem.message)}"
        kinds[text] = kinds.get(text, 0) + 1
    lines = [text if count == 1 else f"{text} (in {count} layers)" for text, count in kinds.items()]
    more = len(lines) - _MAX_PROBLEMS
    return lines if more <= 0 else [*lines[:_MAX_PROBLEMS], f"and {more} more kinds; --json lists all"]


def _facts(report: Inspection) -> list[tuple[str, str]]:
    """What is known of the folder, and nothing that is not."""
    facts = _task_facts(report)
    if report.base_model_name:
        facts.append(("trained on", report.base_model_name))
    if report.num_parameters:
        facts.append(("size", f"{report.num_parameters:,} parameters, {report.num_bytes / 2**20:.2f} MiB in float32"))
    if report.ignored:
        facts.append(("ignored", f"{len(report.ignored)} tensors that change no answer, such as {report.ignored[0]}"))
    if report.digest:
        facts.append(("digest", report.digest))
    return facts


def _task_facts(report: Inspection) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if report.modules:
        facts.append(("variant", ", ".join(("LoRA", *report.variants))))
    if report.task or report.task_type:
        facts.append(("task", f"{report.task or 'not known'} (task_type {report.task_type or 'not given'})"))
    if report.labels:
        more = len(report.labels) - _MAX_LABELS
        shown = ", ".join(report.labels[:_MAX_LABELS]) + (f", and {more} more" if more > 0 else "")
        facts.append(("labels", f"{len(report.labels)}: {shown}"))
    if report.pooling:
        facts.append(("pooling", report.pooling))
    if report.max_length:
        facts.append(("max length", f"{report.max_length} tokens"))
    if report.own_tokenizer:
        facts.append(("tokenizer", "its own"))
    return facts


def _modules_table(modules: Sequence[ModuleReport]) -> Table:
    """Modules of one kind in every layer as one row."""
    table = Table(box=None, padding=(0, 2))
    for heading in ("module", "count", "rank", "scaling", "changes"):
        is_number = heading in ("count", "rank", "scaling")
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=heading != "changes")
    kinds: dict[tuple[str, int | None, float | None, tuple[str, ...]], int] = {}
    for module in modules:
        name = re.sub(_LAYER, "*", module.name)
        kind = name, module.rank, module.scaling, module.changes
        kinds[kind] = kinds.get(kind, 0) + 1
    for (name, rank, scaling, changes), count in kinds.items():
        shown_rank = "" if rank is None else str(rank)
        table.add_row(name, str(count), shown_rank, "" if scaling is None else f"{scaling:g}", ", ".join(changes))
    return table


def _verdict(report: Inspection) -> str:
    against = "" if report.base is None else f" on {escape(report.base)}"
    if not report.loadable:
        count = len(report.problems)
        return f"[bold red]not loadable[/]{against}: {count} problem{'s' if count > 1 else ''}"
    if report.base is None:
        return "[bold green]loadable[/], as far as the folder alone can tell; --base checks it against a base"
    return f"[bold green]loadable[/]{against}"
