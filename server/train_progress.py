"""Training drawn in a terminal: what is about to run, a bar of steps, one line an epoch, a summary."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_runtime.train.metrics.names import metric_of, shown_value
from lora_runtime.train.settings import EpochReport, TrainPlan, TrainReport, TrainSettings


class TrainProgress:
    """A `TrainObserver` that draws on a rich console; use it as a context manager around the run."""

    def __init__(self, console: Console, settings: TrainSettings) -> None:
        self._console = console
        self._settings = settings
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # the epoch lines stay, the bar goes
            disable=not console.is_terminal,  # a log file gets the lines alone
        )
        self._task = self._progress.add_task("loading the base", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_start(self, plan: TrainPlan) -> None:
        """Say what is trained on what, and start the bar."""
        rows = f"{plan.num_train_rows} training rows, {plan.num_valid_rows} validation rows"
        self._say(f"{rows}, {_describe_labels(plan)}")
        if plan.num_truncated_rows:
            rows = "row is" if plan.num_truncated_rows == 1 else "rows are"
            cut = f"{plan.num_truncated_rows} {rows} cut to {self._settings.max_length} tokens"
            self._say(f"{cut}; raise the maximum length to keep them whole")
        scope = f"rank {self._settings.rank} on {', '.join(plan.target_modules)}"
        self._say(f"{plan.num_parameters:,} trainable parameters: {scope}, and the head")
        self._say(f"always the same answer, for comparison: {describe_metrics(plan.baseline)}")
        self._progress.update(self._task, description="training", total=plan.num_steps, completed=0)

    def on_step(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def on_epoch(self, report: EpochReport) -> None:
        """Print the epoch's line."""
        width = len(str(self._settings.epochs))
        losses = f"train loss {report.train_loss:.4f}  valid loss {report.valid_loss:.4f}"
        place = f"epoch {report.epoch:>{width}}/{self._settings.epochs}"
        self._say(f"{place}  {losses}  {describe_metrics(report.metrics)}{'  best so far' if report.best else ''}")

    def _say(self, text: str) -> None:
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)


def print_summary(console: Console, report: TrainReport) -> None:
    """The best epoch, where it lies, and how long it took."""
    size = sum(file.stat().st_size for file in report.out.iterdir())
    best = f"best epoch {report.best.epoch}: {describe_metrics(report.best.metrics)}"
    place = f"adapter written to {report.out} ({size / 2**20:.1f} MiB)"
    console.print(escape(f"{best}\n{place} in {report.seconds:.0f} s"), highlight=False, soft_wrap=True)


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """`accuracy 93.8 %  macro-F1 0.937`, or the errors of a regression."""
    return "  ".join(f"{metric_of(name).title} {shown_value(name, value)}" for name, value in metrics.items())


def _describe_labels(plan: TrainPlan) -> str:
    if len(plan.labels) == 1:
        return f"1 value ({plan.labels[0]})"
    shown = ", ".join(plan.labels[:8])
    return f"{len(plan.labels)} labels ({shown}{', …' if len(plan.labels) > 8 else ''})"
