"""Training drawn in a terminal: what is about to run, a bar of steps with the loss, a line a pass, a summary."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_runtime.train.metrics.names import metric_of, shown_value
from lora_runtime.train.progress import EvalReport, TrainPlan, TrainReport
from lora_runtime.train.settings import TrainSettings
from lora_runtime.types import Task

_WITH_HEAD = frozenset({Task.CLASSIFY, Task.CLASSIFY_TOKENS, Task.ANSWER})
_LIVE_SHARE = 0.1  # of the newest step in the loss that is shown


class TrainProgress:
    """A `TrainObserver` that draws on a rich console; use it as a context manager around the run."""

    def __init__(self, console: Console, settings: TrainSettings) -> None:
        self.is_training = False
        self._console = console
        self._settings = settings
        self._stops = False
        self._loss: float | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # the lines stay, the bar goes
            disable=not console.is_terminal,  # a log file gets the lines alone
        )
        self._task = self._progress.add_task("loading the base", total=None, loss="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stop_after_step(self) -> None:
        """End the run when the step under way is done."""
        self._stops = True
        self._say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")

    def on_start(self, plan: TrainPlan) -> None:
        """Say what is trained on what, and start the bar."""
        labels = f", {_describe_labels(plan)}" if plan.labels else ""
        self._say(f"{plan.num_train_rows} training rows, {plan.num_valid_rows} validation rows{labels}")
        self._say_lengths(plan)
        lora = self._settings.lora
        form = "".join(f" {name}" for name in ("rslora", "dora") if getattr(lora, name))
        scope = f"rank {lora.rank}{form} on {', '.join(plan.target_modules)}"
        head = ", and the head" if plan.task in _WITH_HEAD else ""
        self._say(f"{plan.num_parameters:,} trainable parameters: {scope}{head}")
        if plan.baseline:
            self._say(f"{plan.baseline_of}, for comparison: {describe_metrics(plan.baseline)}")
        if plan.num_processes > 1 or plan.device != "cpu":
            several = f", {plan.num_processes} processes" if plan.num_processes > 1 else ""
            self._say(f"on {plan.device}{several}")
        if plan.privacy is not None:
            self._say(f"private, {plan.privacy}")
            if plan.privacy.warning is not None:
                self._say(f"warning: {plan.privacy.warning}")
        self.is_training = True
        self._progress.update(self._task, description="training", total=plan.num_steps, completed=0)

    def on_step(self, step: int, loss: float) -> None:
        """Move the bar; raises KeyboardInterrupt when the run is to end here."""
        before = loss if self._loss is None else self._loss
        self._loss = (1 - _LIVE_SHARE) * before + _LIVE_SHARE * loss
        self._progress.update(self._task, completed=step, loss=f"  loss {self._loss:.4f}")
        if self._stops:
            raise KeyboardInterrupt

    def on_eval(self, report: EvalReport) -> None:
        """Print the pass's line."""
        width = len(str(self._settings.optim.epochs))
        losses = f"train loss {report.train_loss:.4f}  valid loss {report.valid_loss:.4f}"
        epoch = f"{report.epoch:>{width}.0f}" if report.epoch.is_integer() else f"{report.epoch:.2f}"
        place = f"epoch {epoch}/{self._settings.optim.epochs}"
        self._say(f"{place}  {losses}  {describe_metrics(report.metrics)}{'  best so far' if report.best else ''}")

    def _say_lengths(self, plan: TrainPlan) -> None:
        limit = self._settings.data.max_length
        if plan.num_truncated_rows:
            rows = "row is" if plan.num_truncated_rows == 1 else "rows are"
            what = "read in windows of" if plan.task is Task.ANSWER else "cut to"
            self._say(f"{plan.num_truncated_rows} {rows} {what} {limit} tokens; raise --max-length to keep them whole")
        if plan.num_skipped_rows:
            rows = "row is" if plan.num_skipped_rows == 1 else "rows are"
            self._say(f"{plan.num_skipped_rows} {rows} left out: the prompt alone fills {limit} tokens")

    def _say(self, text: str) -> None:
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)


def print_summary(console: Console, report: TrainReport) -> None:
    """The best epoch, where it lies, and how long it took."""
    size = sum(file.stat().st_size for file in report.out.iterdir())
    best = f"best epoch {report.best.epoch:g}: {describe_metrics(report.best.metrics)}"
    if report.stopped_early:
        best = f"stopped early, {report.plan.selection} did not get better\n{best}"
    if report.privacy is not None:
        best = f"{best}\nprivate, {report.privacy}"
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
