"""`--search` of `multilora train`: its options, and a search drawn in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.metrics.names import metric_of, shown_value
from lora_runtime.train.progress import EvalReport, TrainObserver, TrainPlan
from lora_runtime.train.search.progress import SearchPlan, SearchReport, TrialReport, TrialState
from lora_runtime.train.search.space import Space, Value, described, is_searched, parse_space
from lora_runtime.train.settings import TrainSettings

_PANEL = "Search"


def _option(text: str, *flags: str, metavar: str | None = None) -> Any:
    return typer.Option(*flags, help=text, metavar=metavar, rich_help_panel=_PANEL)


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What `--search` says."""

    trials: int
    timeout_s: float | None
    space: tuple[str, ...]
    storage: Path | None

    def space_of(self, settings: TrainSettings) -> Space:
        return parse_space(self.space, settings)


def search_options(
    search: Annotated[
        str | None,
        _option(
            "Train that many times with other hyper-parameters, and keep the best by the task's metric. The same"
            " command goes on after an interruption; no trial starts after S seconds.",
            metavar="trials=N[,timeout=S]",
        ),
    ] = None,
    search_space: Annotated[
        list[str] | None,
        _option(
            "What a hyper-parameter may be: rank=4,8,16 or dropout=0..0.2 or learning_rate=1e-4..3e-3:log; one value"
            " fixes it. May be repeated. Default: learning_rate (a tenth to five times), rank, dropout, scheduler and"
            " batch_size (half to twice).",
            metavar="NAME=VALUES",
        ),
    ] = None,
    search_storage: Annotated[
        Path | None, _option("SQLite file of the trials. Default: in a hidden folder beside --out.")
    ] = None,
) -> SearchOptions | None:
    """From the values of the options, None without a search; raises InvalidRequest."""
    if search is None:
        for name, value in (("search_space", search_space), ("search_storage", search_storage)):
            if value:
                raise InvalidRequest(name, "has no meaning without search, such as --search trials=20")
        return None
    trials, timeout_s = _parse(search)
    return SearchOptions(trials, timeout_s, tuple(search_space or ()), search_storage)


def _parse(text: str) -> tuple[int, float | None]:
    remedy = "write trials=N or trials=N,timeout=SECONDS"
    found: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("trials", "timeout") or name in found:
            raise InvalidRequest("search", f"is {text!r}; {remedy}")
        found[name] = value
    try:
        return int(found["trials"]), float(found["timeout"]) if "timeout" in found else None
    except (KeyError, ValueError):
        raise InvalidRequest("search", f"is {text!r}; {remedy}") from None


class SearchProgress:
    """A `SearchObserver` that draws on a rich console, and the `TrainObserver` of every trial."""

    def __init__(self, console: Console) -> None:
        self.is_training = False
        self._stops = False
        self._searched: tuple[str, ...] = ()
        self._selection = ""
        self._num_trials = 0
        self._has_baseline = False
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("reading the rows", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stop_after_step(self) -> None:
        """End the trial when the step under way is done."""
        self._stops = True
        self._say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")

    def on_search(self, plan: SearchPlan) -> None:
        """Say what is searched, and what is known already."""
        self._selection, self._num_trials = plan.selection, plan.num_trials
        self._searched = tuple(name for name, values in plan.space.items() if is_searched(values))
        better = "higher" if plan.more_is_better else "lower"
        self._say(f"searching for a {better} {metric_of(plan.selection).title} in {plan.num_trials} trials")
        for name, values in plan.space.items():
            self._say(f"  {name:<{max(map(len, plan.space))}}  {values}")
        if plan.done:
            best = plan.best(plan.done)
            told = "" if best is None else f", the best of them trial {best.number}: {self._metric(best)}"
            ended = sum(trial.state is not TrialState.INTERRUPTED for trial in plan.done)
            within = f", within trial {plan.done[-1].number}" if ended < len(plan.done) else ""
            self._say(f"going on after {ended} {'trial' if ended == 1 else 'trials'}{told}{within}")

    def on_trial(self, number: int, values: Mapping[str, Value]) -> TrainObserver:
        """Name it on the bar; its line at the end has the values."""
        del values
        self.is_training = False
        self._progress.update(self._task, description=self._place(number), total=None, completed=0)
        return self

    def on_trial_end(self, trial: TrialReport, *, best: bool) -> None:
        """Print its line."""
        parts = [self._place(trial.number), described(trial.values, self._searched), self._metric(trial)]
        if trial.state is not TrialState.FINISHED:
            parts.append(f"{trial.state}{f': {trial.reason}' if trial.reason else ''}")
        self._say("  ".join(part for part in (*parts, "best so far" if best else "") if part))

    def on_start(self, plan: TrainPlan) -> None:
        """The first trial's rows are those of all."""
        if not self._has_baseline:
            self._has_baseline = True
            self._say(f"{plan.num_train_rows} training rows, {plan.num_valid_rows} validation rows, on {plan.device}")
            if (base := plan.baseline.get(self._selection)) is not None:
                self._say(f"{plan.baseline_of}, for comparison: {shown_value(self._selection, base)}")
        self.is_training = True
        self._progress.update(self._task, total=plan.num_steps, completed=0)

    def on_step(self, step: int, loss: float) -> None:
        """Move the bar; raises KeyboardInterrupt when the search is to end here."""
        del loss
        self._progress.update(self._task, completed=step)
        if self._stops:
            raise KeyboardInterrupt

    def on_eval(self, report: EvalReport) -> None:
        """The trial's line tells its best one."""

    def _place(self, number: int) -> str:
        return f"trial {number:>{len(str(self._num_trials))}}/{self._num_trials}"

    def _metric(self, trial: TrialReport) -> str:
        if trial.metric is None:
            return ""
        return f"{metric_of(self._selection).title} {shown_value(self._selection, trial.metric)}"

    def _say(self, text: str) -> None:
        self._progress.console.print(escape(text), highlight=False, soft_wrap=True)


def print_search_summary(console: Console, report: SearchReport) -> None:
    """The best trial, where its adapter lies, how the search can be extended."""
    best, plan = report.best, report.plan
    searched = [name for name, values in plan.space.items() if is_searched(values)]
    metric = "" if best.metric is None else shown_value(plan.selection, best.metric)
    lines = (
        f"best of {len(report.trials)}: trial {best.number}, {metric_of(plan.selection).title} {metric}",
        f"  {described(best.values, searched)}",
        f"adapter written to {report.out} after {report.seconds:.0f} s of trials",
        f"the trials stay in {plan.storage}: more of them and --overwrite extend the search",
    )
    console.print(escape("\n".join(lines)), highlight=False, soft_wrap=True)
