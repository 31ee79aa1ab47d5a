"""`multilora train …`: fine-tuning from the command line."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lora_runtime.errors import MultiloraError
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.train.settings import Schedule, TrainSettings
from lora_runtime.types import ProblemType
from server.train_progress import TrainProgress, print_summary

train_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Fine-tune LoRA adapters that this server loads.",
)

_DATA, _LORA, _RUN = "Data", "LoRA", "Training"


class ProblemName(StrEnum):
    """The problem types as they are typed on a command line."""

    SINGLE_LABEL = "single-label"
    MULTI_LABEL = "multi-label"
    REGRESSION = "regression"


@train_app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction] - keeps `classify` a command of its own name
    """Fine-tune LoRA adapters that this server loads."""


@train_app.command(no_args_is_help=True)
def classify(
    base: Annotated[str, typer.Option(help="The base model: a folder, or a name on the hub.")],
    train: Annotated[Path, typer.Option(help="Training rows: CSV, TSV, JSON, JSONL, parquet, a dataset folder.")],
    out: Annotated[Path, typer.Option(help="The adapter folder to write.")],
    valid: Annotated[
        Path | None, typer.Option(help="Validation rows. Default: a stratified part of the training rows.")
    ] = None,
    valid_share: Annotated[
        float,
        typer.Option(help="The part of the training rows held out when --valid is not given.", rich_help_panel=_DATA),
    ] = 0.1,
    text_column: Annotated[str, typer.Option(help="The text.", rich_help_panel=_DATA)] = "text",
    pair_column: Annotated[
        str | None,
        typer.Option(help="The second text of a pair. Default: text_pair, if there is one.", rich_help_panel=_DATA),
    ] = None,
    label_column: Annotated[
        str, typer.Option(help="The label, or the number to predict.", rich_help_panel=_DATA)
    ] = "label",
    problem_type: Annotated[
        ProblemName, typer.Option(help="What the labels are.", rich_help_panel=_DATA)
    ] = ProblemName.SINGLE_LABEL,
    separator: Annotated[
        str, typer.Option(help="What joins the labels of a multi-label row.", rich_help_panel=_DATA)
    ] = "|",
    max_length: Annotated[
        int, typer.Option(help="Tokens of a text or pair; longer ones are cut.", rich_help_panel=_DATA)
    ] = 128,
    rank: Annotated[int, typer.Option(help="Rank of every adapted site.", rich_help_panel=_LORA)] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(help="LoRA alpha; scaling is alpha / rank. Default: twice the rank.", rich_help_panel=_LORA),
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout before A.", rich_help_panel=_LORA)] = 0.05,
    target_modules: Annotated[
        str,
        typer.Option(
            help="Endings of module paths, comma-separated; auto: every attention and MLP linear.",
            rich_help_panel=_LORA,
        ),
    ] = "auto",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (AdamW).", rich_help_panel=_RUN)] = 1e-3,
    scheduler: Annotated[
        Schedule, typer.Option(help="The learning rate after the warm-up.", rich_help_panel=_RUN)
    ] = Schedule.LINEAR,
    warmup_ratio: Annotated[
        float, typer.Option(help="The part of all steps that warms up.", rich_help_panel=_RUN)
    ] = 0.1,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.", rich_help_panel=_RUN)] = 10,
    batch_size: Annotated[int, typer.Option(help="Rows a step.", rich_help_panel=_RUN)] = 16,
    seed: Annotated[
        int, typer.Option(help="Of the split, the head, A, the order and dropout.", rich_help_panel=_RUN)
    ] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: as many as torch takes.", rich_help_panel=_RUN)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in the folder.")] = False,
) -> None:
    """Fine-tune a text classifier, and write its adapter folder.

    The epoch with the best validation result is kept: by accuracy, by macro-F1 for multi-label rows, by mean
    squared error for regression. The folder appears when training has succeeded, never before.
    """
    console, errors = Console(), Console(stderr=True)
    try:
        settings = TrainSettings(
            base=base,
            train=train,
            out=out,
            valid=valid,
            schema=ClassifySchema(text_column, pair_column, label_column, ProblemType[problem_type.name], separator),
            valid_share=valid_share,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=_targets(target_modules),
            learning_rate=learning_rate,
            schedule=scheduler,
            warmup_ratio=warmup_ratio,
            epochs=epochs,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            threads=threads,
            overwrite=overwrite,
        )
        _require_training_extra(errors)
        _run(settings, console)
    except MultiloraError as error:
        errors.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error


def _run(settings: TrainSettings, console: Console) -> None:
    from lora_runtime.train.classify import train_classifier  # seconds of torch, for this command alone

    with TrainProgress(console, settings) as progress:
        report = train_classifier(settings, progress)
    print_summary(console, report)


def _targets(text: str) -> tuple[str, ...] | None:
    """None for `auto`, else the names of a comma-separated list."""
    if text.strip() == "auto":
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _require_training_extra(errors: Console) -> None:
    missing = [name for name in ("peft", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        message = f"training needs {' and '.join(missing)}: pip install '.[train]' in the repository"
        errors.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)
