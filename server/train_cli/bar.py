"""The bar of optimizer steps that a run and a search draw, with lines above it that stay."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepBar:
    """Draws on a rich console while it is used as a context manager; a log file gets the lines alone."""

    def __init__(self, console: Console, description: str) -> None:
        self.is_training = False
        self._stops = False
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps{task.fields[beside]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # the lines stay, the bar goes
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(description, total=None, beside="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stop_after_step(self) -> None:
        """End what trains when the step under way is done."""
        self._stops = True
        self._say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")

    def _move(self, step: int, beside: str = "") -> None:
        """Move the bar; raises KeyboardInterrupt when it is to end here."""
        self._progress.update(self._task, completed=step, beside=beside)
        if self._stops:
            raise KeyboardInterrupt

    def _say(self, text: str) -> None:
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)
