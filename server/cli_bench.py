"""`multilora bench`: benchmarks with their outputs checked, printed and written as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

bench_app = typer.Typer(
    help="Measure throughput; outputs are checked before a speed is printed.",
    no_args_is_help=True,
    add_completion=False,
)

_MEANING = {
    "own_base": "packed batches, no adapter, one head",
    "own_mixed": "packed batches, every text its own adapter and head",
    "own_engine": "the same through the engine's queue",
    "transformers_base": "padded batches, sorted by length, no adapter, one head",
    "peft_mixed": "padded batches, sorted by length, PEFT adapter_names",
}


@bench_app.callback()
def main() -> None:
    """Keeps `encoder` a sub-command while it is the only one."""


@bench_app.command()
def encoder(
    base: Annotated[str | None, typer.Option(help="Folder or name of the encoder. Default: the packaged one.")] = None,
    adapters: Annotated[int, typer.Option(help="Adapters, each with its own head.", min=1)] = 64,
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 8,
    targets: Annotated[str, typer.Option(help="qv (query, value) or all (every linear layer).")] = "qv",
    texts: Annotated[int, typer.Option(help="Texts classified in each round.", min=1)] = 256,
    rounds: Annotated[int, typer.Option(help="Counted rounds.", min=1)] = 7,
    threads: Annotated[int, typer.Option(help="torch threads, for all contenders.", min=1)] = 2,
    token_budget: Annotated[int, typer.Option(help="Tokens in a packed batch.", min=64)] = 2048,
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Own mixed batches against own base, transformers and PEFT, interleaved in one run."""
    console = Console()
    try:
        from server.bench.encoder import TARGETS, EncoderBench, run_encoder_bench
        from server.bench.measure import OutputsDiffer
        from server.bench.texts import default_base, sample_texts
    except ModuleNotFoundError as error:
        console.print(f"[red]{error.name} is not installed:[/] pip install '.\\[demo]' in the repository")
        raise typer.Exit(1) from error
    if targets not in TARGETS:
        raise typer.BadParameter(f"{targets!r} is not one of {', '.join(TARGETS)}", param_hint="--targets")
    bench = EncoderBench(
        base=base or default_base(),
        texts=sample_texts(texts),
        num_adapters=adapters,
        rank=rank,
        targets=targets,
        rounds=rounds,
        threads=threads,
        token_budget=token_budget,
    )
    try:
        with console.status("starting") as status:
            result = run_encoder_bench(bench, lambda text: status.update(text))
    except OutputsDiffer as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(1) from error
    _print(console, result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {out}")


def _print(console: Console, result: dict[str, Any]) -> None:
    settings, machine = result["settings"], result["machine"]
    speeds = Table(title=f"{settings['num_adapters']} adapters of rank {settings['rank']} on {settings['targets']}")
    for heading in ("contender", "what it does", "texts/s", "low", "high", "largest error"):
        speeds.add_column(heading, justify="left" if heading in ("contender", "what it does") else "right")
    for name, spread in result["texts_per_second"].items():
        error = result["largest_error"].get(name)
        figures = [f"{spread[key]:.1f}" for key in ("median", "low", "high")]
        speeds.add_row(name, _MEANING[name], *figures, "reference" if error is None else f"{error:.0e}")
    ratios = Table(title="ratios of throughput, round by round")
    for heading in ("ratio", "median", "low", "high"):
        ratios.add_column(heading, justify="left" if heading == "ratio" else "right")
    for name, spread in result["ratios"].items():
        ratios.add_row(name, *(f"{spread[key]:.3f}" for key in ("median", "low", "high")))
    console.print(speeds)
    console.print(ratios)
    console.print(
        f"{result['texts']['count']} texts, median {result['texts']['median_tokens']} tokens; "
        f"{machine['processor']}, {settings['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    )
