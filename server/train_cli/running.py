"""One run from the command line: its errors, its interruption, its exit code."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.markup import escape

from lora_runtime.errors import MultiloraError
from lora_runtime.train.settings import TrainSettings
from server.train_cli.progress import TrainProgress, print_summary
from server.train_cli.publishing import Publication
from server.train_cli.searching import SearchOptions, SearchProgress, print_search_summary

INTERRUPTED = 130  # as shells report SIGINT
_GO_ON = "the trials that are done are kept; give the same command to go on from where it is"


@dataclass(frozen=True, slots=True)
class TrainCommand:
    """What a command line of `multilora train` says."""

    settings: TrainSettings
    search: SearchOptions | None
    publication: Publication | None


def run_command(make_command: Callable[[], TrainCommand]) -> None:
    """Train, and leave by typer.Exit: 1 when the run is refused or not published, 130 when it was interrupted."""
    errors = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")  # one of several processes speaks
    try:
        command = make_command()
        _require_training_extra()
        is_first = _run(command, errors)
    except MultiloraError as error:
        _say(errors, f"[bold red]error:[/] {escape(error.message)}")
        raise typer.Exit(1) from error
    if command.publication is not None and is_first:
        command.publication.publish("train", command.settings.run.out)


def _run(command: TrainCommand, errors: Console) -> bool:
    """Whether this process is the first of the run's."""
    from torch import OutOfMemoryError

    from lora_runtime.train.processes import leave_processes, this_process  # seconds of torch, for this command alone

    process = this_process()
    console = Console(quiet=not process.is_first)
    run = _train if command.search is None else _search
    try:
        summarise = run(command, console, process.count == 1)
    except OutOfMemoryError as error:
        remedy = "lower --batch-size and raise --gradient-accumulation, or try --gradient-checkpointing"
        _say(errors, f"[bold red]error:[/] the device is out of memory; {escape(remedy)}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        what = _what_is_kept(command.settings.run.out) if command.search is None else _GO_ON
        _say(errors, f"[bold]interrupted:[/] {escape(what)}")
        raise typer.Exit(INTERRUPTED) from None
    leave_processes(process)
    if process.is_first:
        summarise()
    return process.is_first


def _train(command: TrainCommand, console: Console, alone: bool) -> Callable[[], None]:
    from lora_runtime.train.run import train

    with TrainProgress(console, command.settings) as progress, _interruptible(progress, alone=alone):
        report = train(command.settings, progress)
    return partial(print_summary, console, report)


def _search(command: TrainCommand, console: Console, alone: bool) -> Callable[[], None]:
    from lora_runtime.train.search.run import search

    options, settings = command.search, command.settings
    assert options is not None
    space = options.space_of(settings)
    with SearchProgress(console) as progress, _interruptible(progress, alone=alone):
        report = search(settings, space, options.trials, progress, timeout_s=options.timeout_s, storage=options.storage)
    return partial(print_search_summary, console, report)


@contextmanager
def _interruptible(progress: TrainProgress | SearchProgress, *, alone: bool) -> Generator[None]:
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
