"""One run from the command line: its errors, its interruption, its exit code."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.markup import escape

from lora_runtime.errors import MultiloraError
from lora_runtime.train.settings import TrainSettings
from server.train_cli.progress import TrainProgress, print_summary

INTERRUPTED = 130  # as shells report SIGINT


def run_command(make_settings: Callable[[], TrainSettings]) -> None:
    """Train, and leave by typer.Exit: 1 when the run is refused, 130 when it was interrupted."""
    errors = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")  # one of several processes speaks
    try:
        settings = make_settings()
        _require_training_extra()
        _run(settings, errors)
    except MultiloraError as error:
        _say(errors, f"[bold red]error:[/] {escape(error.message)}")
        raise typer.Exit(1) from error


def _run(settings: TrainSettings, errors: Console) -> None:
    from torch import OutOfMemoryError

    from lora_runtime.train.processes import leave_processes, this_process  # seconds of torch, for this command alone
    from lora_runtime.train.run import train

    process = this_process()
    console = Console(quiet=not process.is_first)
    try:
        with TrainProgress(console, settings) as progress, _interruptible(progress, alone=process.count == 1):
            report = train(settings, progress)
    except OutOfMemoryError as error:
        remedy = "lower --batch-size and raise --gradient-accumulation, or try --gradient-checkpointing"
        _say(errors, f"[bold red]error:[/] the device is out of memory; {escape(remedy)}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _say(errors, f"[bold]interrupted:[/] {escape(_what_is_kept(settings.run.out))}")
        raise typer.Exit(INTERRUPTED) from None
    leave_processes(process)
    if process.is_first:
        print_summary(console, report)


@contextmanager
def _interruptible(progress: TrainProgress, *, alone: bool) -> Generator[None]:
    """Ctrl-C ends the run after the step under way, with a checkpoint; a second one ends it at once.

    One of several processes cannot stop on its own: the others would wait for it. There Ctrl-C ends all at once.
    """
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        signal.signal(signal.SIGINT, before)
        if not progress.is_training:
            raise KeyboardInterrupt
        progress.stop_after_step()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _what_is_kept(out: Path) -> str:
    from lora_runtime.train.checkpoints import is_resumable

    if is_resumable(out):
        return "give the same command with --resume to go on from where it is"
    return "nothing is left of it; there was no checkpoint yet"


def _require_training_extra() -> None:
    missing = [name for name in ("peft", "accelerate", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise MultiloraError(f"training needs {' and '.join(missing)}: pip install '.[train]' in the repository")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)
