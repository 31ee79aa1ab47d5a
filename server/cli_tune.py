"""`multilora tune`: measures the kernels' block sizes on this machine's GPU and writes them as a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from lora_runtime.kernels.grouped_lora.triton_backend.tuner import Case, Timed

tune_app = typer.Typer(add_completion=False)

Shape = tuple[int, int]  # (d_in, d_out)


@tune_app.command(no_args_is_help=True)
def tune(
    base: Annotated[str | None, typer.Option(help="Tune for the shapes of this base: a folder or name.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Tune for these: d_in:d_out,… instead of a base.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    ranks: Annotated[str, typer.Option(help="Some of 16, 64 and 256.")] = "16,64,256",
    tokens: Annotated[str, typer.Option(help="Some of 16, 64, 256, 1024, 4096.")] = "16,64,256,1024,4096",
    out: Annotated[Path | None, typer.Option(help="Write the table here as JSON.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List cases, check one, time nothing.")] = False,
) -> None:
    """Find the fastest block sizes of the LoRA kernels on this machine's GPU.

    Every candidate is compared with the reference before it is timed. --dry-run
    needs no GPU: Triton's interpreter then runs the smallest case on the CPU.
    """
    import torch

    console = Console()
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        if not dry_run:
            _end(console, "there is nothing to tune on this device: no CUDA device was found (--dry-run needs none)")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by what is imported below
    try:
        from lora_runtime.kernels.grouped_lora.triton_backend import tuner
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        _end(console, "triton is not installed: pip install 'multilora[gpu]'")
    chosen_dtype = _dtype(dtype)
    cases = _cases(_shapes(base, shapes), ranks, tokens, tuner.Case)
    if dry_run:
        _dry_run(console, cases, torch.device("cuda" if has_cuda else "cpu"), chosen_dtype)
        return
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        with console.status("starting") as status:
            timed = tuner.tune(cases, device, chosen_dtype, status.update)
    except tuner.OutputDiffers as error:
        _end(console, str(error))
    major, minor = torch.cuda.get_device_capability(device)
    file = tuner.table_of(timed, torch.cuda.get_device_name(device), f"{major}.{minor}", chosen_dtype)
    _print(console, [one for results in tuner.choose(timed).values() for one in results], file.device)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(file.model_dump_json(indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {escape(str(out))}")


def _dry_run(console: Console, cases: list[Case], device: torch.device, dtype: torch.dtype) -> None:
    """List the cases; run the smallest one with the default block sizes and compare it with the reference."""
    from lora_runtime.kernels.grouped_lora.triton_backend.tuner import (
        TILE_ROWS,
        OutputDiffers,
        Workload,
        expand_candidates,
        first_candidate,
        shrink_candidates,
    )

    table = Table(title=f"{len(cases)} cases, {', '.join(map(str, TILE_ROWS))} rows a tile")
    for heading in ("case", "candidates"):
        table.add_column(heading, justify="right" if heading == "candidates" else "left")
    for case in cases:
        count = 1 + sum(1 for _ in shrink_candidates(case)) + sum(1 for _ in expand_candidates(case))
        table.add_row(str(case), str(count * len(TILE_ROWS)))
    console.print(table)
    smallest = min(cases, key=lambda case: case.tokens * case.rank * case.d_in * case.d_out)
    try:
        error = Workload(smallest, device, dtype).check(first_candidate(smallest))
    except OutputDiffers as differs:
        _end(console, str(differs))
    console.print(f"{smallest}: error {error:.1e} against fp64 on {device.type}; nothing was timed", soft_wrap=True)


def _shapes(base: str | None, shapes: str | None) -> list[Shape]:
    if (base is None) == (shapes is None):
        raise typer.BadParameter("give either --base or --shapes", param_hint="--base")
    return _shapes_of(base) if base is not None else _parse_shapes(shapes or "")


def _parse_shapes(text: str) -> list[Shape]:
    found: set[Shape] = set()
    for part in filter(None, map(str.strip, text.split(","))):
        d_in, _, d_out = part.partition(":")
        if not (d_in.isdecimal() and d_out.isdecimal() and int(d_in) and int(d_out)):
            raise typer.BadParameter(f"{part!r} is not two widths, such as 768:3072", param_hint="--shapes")
        found.add((int(d_in), int(d_out)))
    if not found:
        raise typer.BadParameter("names no shape", param_hint="--shapes")
    return sorted(found)


def _shapes_of(base: str) -> list[Shape]:
    from lora_runtime.errors import BaseModelUnsupported
    from lora_runtime.model.load import load_base

    try:
        spec = load_base(base, prepack=False).spec
    except BaseModelUnsupported as error:
        raise typer.BadParameter(error.message, param_hint="--base") from error
    return sorted({(site.d_in, site.d_out) for site in spec.sites})


def _dtype(name: str) -> torch.dtype:
    from lora_runtime.kernels.grouped_lora.registry import TOLERANCES

    known = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--dtype")
    return known[name]


def _cases(shapes: list[Shape], ranks: str, tokens: str, make: Callable[[int, int, int, int], Case]) -> list[Case]:
    from lora_runtime.kernels.grouped_lora.triton_backend.tuning import RANK_BUCKETS, TOKEN_BUCKETS

    chosen_ranks = _buckets(ranks, RANK_BUCKETS, "--ranks")
    chosen_tokens = _buckets(tokens, TOKEN_BUCKETS, "--tokens")
    return [make(*shape, rank, count) for shape in shapes for rank in chosen_ranks for count in chosen_tokens]


def _buckets(text: str, known: tuple[int, ...], flag: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in map(str, known)]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(map(str, known))}", param_hint=flag)
    if not parts:
        raise typer.BadParameter("names none", param_hint=flag)
    return sorted(set(map(int, parts)))


def _print(console: Console, timed: list[Timed], device: str) -> None:
    table = Table(title=escape(device))
    for heading in ("case", "tile", "shrink: rank, in, split", "expand: rank, out", "µs"):
        table.add_column(heading, justify="right" if heading in ("tile", "µs") else "left")
    for one in timed:
        shrink, expand = one.candidate.shrink, one.candidate.expand
        table.add_row(
            str(one.case),
            str(one.candidate.tile_rows),
            f"{shrink.block_rank}, {shrink.block_in}, {shrink.split}",
            f"{expand.block_rank}, {expand.block_out}",
            f"{one.seconds * 1e6:.1f}",
        )
    console.print(table)


def _end(console: Console, why: str) -> NoReturn:
    console.print(f"[red]multilora tune:[/] {escape(why)}", soft_wrap=True)
    raise typer.Exit(1)
