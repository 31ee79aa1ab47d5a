"""`multilora extract` and `multilora compress`: adapters from singular values, without training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lora_runtime.errors import MultiloraError
from lora_runtime.types import Task
from server.train_cli.publishing import publishes

extract_app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
compress_app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

_RANKS, _RUN = "Ranks", "Run"


class TaskName(StrEnum):
    """The tasks as they are typed on a command line."""

    CLASSIFY = "classify"
    CLASSIFY_TOKENS = "classify-tokens"
    ANSWER = "answer"
    EMBED = "embed"
    GENERATE = "generate"


class DtypeName(StrEnum):
    """Of A and B."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_Rank = Annotated[
    int | None,
    typer.Option(help="Rank of every site. Give it or --energy.", rich_help_panel=_RANKS, show_default=False),
]
_Energy = Annotated[
    float | None,
    typer.Option(
        help="For each site the least rank that keeps this share of its change's squared norm; 1 keeps all.",
        rich_help_panel=_RANKS,
        show_default=False,
    ),
]
_MaxRank = Annotated[
    int | None,
    typer.Option(help="The most that --energy may take for a site.", rich_help_panel=_RANKS, show_default=False),
]
_Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Also write the findings there as JSON, Markdown and PNG (needs the extra plots).",
        rich_help_panel=_RUN,
        show_default=False,
    ),
]
_Threads = Annotated[
    int | None, typer.Option(help="CPU threads. Default: as many as torch takes.", rich_help_panel=_RUN)
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in the folder.")]


@extract_app.command(no_args_is_help=True)
@publishes
def extract(
    base: Annotated[Path, typer.Option(metavar="FOLDER", help="The model that the fine-tuning began from.")],
    tuned: Annotated[Path, typer.Option(metavar="FOLDER", help="The fully fine-tuned model.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The adapter folder to write.")],
    rank: _Rank = None,
    energy: _Energy = None,
    max_rank: _MaxRank = None,
    targets: Annotated[
        str,
        typer.Option(help="Endings of module paths, comma-separated; auto: every linear layer and embedding."),
    ] = "auto",
    task: Annotated[
        TaskName | None, typer.Option(help="Default: by the class that the tuned model was saved from.")
    ] = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Of A and B; what is carried whole keeps its own.")
    ] = DtypeName.FLOAT32,
    report: _Report = None,
    threads: _Threads = None,
    overwrite: _Overwrite = False,
) -> None:
    """Turn a fully fine-tuned model into a LoRA adapter of its base.

    Each changed linear layer and embedding gets the truncated SVD of its change. Heads, changed norms and changed
    biases go along whole. What cannot be carried is listed with its size. Both models are read from safetensors,
    one matrix at a time.
    """
    console = Console()
    with _told():
        # seconds of torch, for these commands alone
        from lora_runtime.svd.extract import extract_adapter
        from lora_runtime.svd.settings import ExtractSettings, FactorDtype, RankRule
        from server.svd_tables import print_extract, progress, report_writer

        settings = ExtractSettings(
            base=base,
            tuned=tuned,
            out=out,
            ranks=RankRule(rank, energy, max_rank),
            targets=_targets(targets),
            task=None if task is None else Task[task.name],
            dtype=FactorDtype(dtype.value),
            overwrite=overwrite,
            threads=threads,
        )
        write = report_writer(report, console)
        with progress(console) as observer:
            found = extract_adapter(settings, observer)
        print_extract(console, found)
        write(found)


@compress_app.command(no_args_is_help=True)
@publishes
def compress(
    adapter: Annotated[Path, typer.Option(metavar="FOLDER", help="The adapter to compress; it is not changed.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The adapter folder to write.")],
    rank: _Rank = None,
    energy: _Energy = None,
    max_rank: _MaxRank = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of A and B where the rank is lowered. Default: their own.")
    ] = None,
    report: _Report = None,
    threads: _Threads = None,
    overwrite: _Overwrite = False,
) -> None:
    """Lower an adapter's rank by the SVD of B·A, without its base.

    A site whose rank is not lowered stays as it is, and so do head, labels and tokenizer. The error of each site is
    the least that its rank allows.
    """
    console = Console()
    with _told():
        from lora_runtime.svd.compress import compress_adapter
        from lora_runtime.svd.settings import CompressSettings, FactorDtype, RankRule
        from server.svd_tables import print_compress, progress, report_writer

        settings = CompressSettings(
            adapter=adapter,
            out=out,
            ranks=RankRule(rank, energy, max_rank),
            dtype=None if dtype is None else FactorDtype(dtype.value),
            overwrite=overwrite,
            threads=threads,
        )
        write = report_writer(report, console)
        with progress(console) as observer:
            found = compress_adapter(settings, observer)
        print_compress(console, found)
        write(found)


def _targets(text: str) -> tuple[str, ...] | None:
    """None for `auto`, else the names of a comma-separated list."""
    if text.strip() == "auto":
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextmanager
def _told() -> Generator[None]:
    """What went wrong in one line, and exit code 1."""
    try:
        yield
    except (MultiloraError, OSError) as error:  # a full disk, a file that may not be read
        message = (
            error.message if isinstance(error, MultiloraError) else f"{error.filename or 'the disk'}: {error.strerror}"
        )
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
