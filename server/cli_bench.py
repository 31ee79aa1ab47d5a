"""`multilora bench`: benchmarks with their outputs checked, printed and written as JSON."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

bench_app = typer.Typer(
    help="Measure speed and memory; outputs are checked before a figure is printed.",
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
    with _installed():
        from server.bench.encoder import TARGETS, EncoderBench, run_encoder_bench
        from server.bench.texts import default_base, sample_texts
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
    _run(lambda progress: run_encoder_bench(bench, progress), _print, out)


@bench_app.command("adapters")
def many_adapters(
    base: Annotated[str | None, typer.Option(help="Folder or name of the encoder. Default: the packaged one.")] = None,
    parts: Annotated[
        str, typer.Option(help="Some of many, storm, cold, replace, memory.")
    ] = "many,storm,cold,replace,memory",
    scale: Annotated[
        str, typer.Option(help="full (minutes, 10,000 adapters) or small (to see that it works).")
    ] = "full",
    threads: Annotated[int, typer.Option(help="torch threads of the servers.", min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """What thousands of adapters, loads and replacements cost the calls of others; real servers, gRPC clients."""
    with _installed():
        from server.bench.adapters.plan import PARTS, SCALES, AdaptersBench
        from server.bench.adapters.run import run_adapters_bench
        from server.bench.texts import default_base
    chosen = _chosen(parts, PARTS)
    if scale not in SCALES:
        raise typer.BadParameter(f"{scale!r} is not one of {', '.join(SCALES)}", param_hint="--scale")
    bench = AdaptersBench(base or default_base(), SCALES[scale], scale, chosen, threads)
    _run(lambda progress: run_adapters_bench(bench, progress), _print_targets, out)


@bench_app.command("tenants")
def many_tenants(
    base: Annotated[str | None, typer.Option(help="Folder or name of the encoder. Default: the packaged one.")] = None,
    parts: Annotated[str, typer.Option(help="Some of noisy, shares, overload, cancels.")] = (
        "noisy,shares,overload,cancels"
    ),
    scale: Annotated[str, typer.Option(help="full (minutes) or small (to see that it works).")] = "full",
    threads: Annotated[int, typer.Option(help="torch threads of the servers.", min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """What tenants notice of a noisy one, of overload and of cancelled calls; real servers, one API key per tenant."""
    with _installed():
        from server.bench.tenants.plan import PARTS, SCALES, TenantsBench
        from server.bench.tenants.run import run_tenants_bench
        from server.bench.texts import default_base
    chosen = _chosen(parts, PARTS)
    if scale not in SCALES:
        raise typer.BadParameter(f"{scale!r} is not one of {', '.join(SCALES)}", param_hint="--scale")
    bench = TenantsBench(base or default_base(), SCALES[scale], scale, chosen, threads)
    _run(lambda progress: run_tenants_bench(bench, progress), _print_targets, out)


@bench_app.command("generate")
def generation(
    base: Annotated[str, typer.Option(metavar="FOLDER_OR_GGUF", help="The decoder.")],
    adapters: Annotated[
        int, typer.Option("--adapters", "--adapters-of", metavar="N", help="Random adapters of it.", min=1)
    ] = 16,
    requests: Annotated[int, typer.Option(help="Texts at once.", min=2)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each text.", min=4)] = 64,
    rounds: Annotated[int, typer.Option(help="Counted rounds.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="torch threads, for all contenders.", min=1)] = 2,
    vllm_python: Annotated[
        Path | None, typer.Option(help="Interpreter of an environment with vLLM for CPUs, to measure that too.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "--output", help="Write the result here as JSON.")] = None,
) -> None:
    """Texts of many adapters at once against the base alone, transformers and vLLM; fp32 on the CPU; streaming."""
    with _installed():
        from server.bench.generate.plan import GenerateBench
        from server.bench.generate.run import run_generate_bench
    if vllm_python is not None and not Path(base).is_dir():
        raise typer.BadParameter("vLLM is measured on a folder of safetensors", param_hint="--vllm-python")
    bench = GenerateBench(base, adapters, requests, new_tokens, rounds, threads, vllm_python=vllm_python)
    _run(lambda progress: run_generate_bench(bench, progress), _print_generation, out)


@contextmanager
def _installed() -> Generator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        Console().print(f"[red]{error.name} is not installed:[/] pip install '.\\[demo]' in the repository")
        raise typer.Exit(1) from error


def _chosen(parts: str, known: Collection[str]) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in parts.split(",") if part.strip())
    if unknown := set(chosen) - {*known}:
        raise typer.BadParameter(f"{min(unknown)!r} is not one of {', '.join(known)}", param_hint="--parts")
    return chosen


def _run(
    measure: Callable[[Callable[[str], None]], dict[str, Any]],
    show: Callable[[Console, dict[str, Any]], None],
    out: Path | None,
) -> None:
    """Measure, show and write; nothing of either when outputs differ."""
    from server.bench.measure import ContenderFailed, OutputsDiffer

    console = Console()
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with console.status("starting") as status:
            result = measure(status.update)
    except (OutputsDiffer, ContenderFailed) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    show(console, result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {out}")


def _end(*_: object) -> None:
    raise SystemExit(143)  # so that the servers of a run end with it


def _print_generation(console: Console, result: dict[str, Any]) -> None:
    settings = result["settings"]
    table = Table(title=f"{result['base']}: {settings['requests']} texts of {settings['new_tokens']} tokens")
    for heading in ("figure", "median", "low", "high"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for key in ("tokens_per_second", "ms_per_token", "first_token_ms", "gap_ms", "ratios", "streaming_ratios"):
        for name, spread in result[key].items():
            figure = name if "ratios" in key else f"{key.replace('_', ' ')}: {name}"
            table.add_row(figure, *(f"{spread[at]:.4g}" for at in ("median", "low", "high")))
    console.print(table)


def _print_targets(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"{result['answers_checked']} answers as PEFT's, largest error {result['largest_error']:.0e}")
    for heading in ("part", "figure", "value", "target", "met"):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for part, found in result["parts"].items():
        for name, target in found["targets"].items():
            limit = f"≤ {target['at_most']:g}" if "at_most" in target else f"≥ {target['at_least']:g}"
            table.add_row(part, name, f"{target['value']:.4g}", limit, "yes" if target["met"] else "[red]no[/]")
    console.print(table)


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
