"""A search as Markdown and a picture: `search.md` and `search.png` beside the adapter, for people alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_runtime.train.metrics.names import metric_of, shown_value
from lora_runtime.train.report.markdown import duration, escape, table
from lora_runtime.train.search.figure import draw_search
from lora_runtime.train.search.progress import SearchReport, TrialReport, TrialState
from lora_runtime.train.search.space import is_searched
from lora_runtime.train.search.space import shown_value as shown_parameter

MARKDOWN_FILE = "search.md"
FIGURE_FILE = "search.png"


def write_search_report(folder: Path, report: SearchReport) -> None:
    """Write both files into a folder that exists; raises InvalidRequest without matplotlib."""
    draw_search(folder / FIGURE_FILE, report)
    (folder / MARKDOWN_FILE).write_text(_render(report), encoding="utf-8", newline="\n")


def _render(report: SearchReport) -> str:
    plan, best = report.plan, report.best
    searched = [name for name, values in plan.space.items() if is_searched(values)]
    title = metric_of(plan.selection).title
    space = [(escape(name), escape(str(values))) for name, values in plan.space.items()]
    sections = [
        f"# {escape(report.out.name)}: hyper-parameter search",
        "\n".join(
            (
                f"- trials: {_counts(report.trials)}",
                f"- compared by: {escape(title)}, {'more' if plan.more_is_better else 'less'} is better",
                f"- best: trial {best.number}, {escape(_metric(plan.selection, best))}",
                f"- time of all trials: {duration(report.seconds)}",
            )
        ),
        "The metric is of each trial's best validation pass. Having been chosen by it, the best one's is a little too"
        " good: measure the adapter on rows that took no part.",
        f"![Values trial by trial, and over each parameter]({FIGURE_FILE})",
        f"## Space\n\n{table(('parameter', 'values'), space)}",
        f"## Trials\n\n{_trials(report, searched, title)}",
    ]
    return "\n\n".join(sections) + "\n"


def _trials(report: SearchReport, searched: Sequence[str], title: str) -> str:
    rows = [_row(report, trial, searched) for trial in report.trials]
    header = ("trial", "state", escape(title), "passes", "seconds", *map(escape, searched), "")
    return table(header, rows, "rlrrr" + "r" * len(searched))


def _row(report: SearchReport, trial: TrialReport, searched: Sequence[str]) -> tuple[str, ...]:
    values = [escape(shown_parameter(trial.values[name])) if name in trial.values else "" for name in searched]
    note = "**best**" if trial.number == report.best.number else escape(trial.reason)
    metric = escape(_metric(report.plan.selection, trial))
    return str(trial.number), str(trial.state), metric, str(trial.num_passes), f"{trial.seconds:.1f}", *values, note


def _metric(name: str, trial: TrialReport) -> str:
    """A pruned trial's is in brackets: it might have become better."""
    if trial.metric is None:
        return ""
    shown = shown_value(name, trial.metric)
    return shown if trial.state is TrialState.FINISHED else f"({shown})"


def _counts(trials: Sequence[TrialReport]) -> str:
    counts = {state: sum(trial.state is state for trial in trials) for state in TrialState}
    return f"{len(trials)} ({', '.join(f'{count} {state}' for state, count in counts.items() if count)})"
