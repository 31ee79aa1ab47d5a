"""A search's picture: the value of each trial with the best so far, and the values over each parameter."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.metrics.names import metric_of
from lora_runtime.train.search.progress import SearchReport, TrialReport, TrialState
from lora_runtime.train.search.space import Choice, Range, is_searched, shown_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = (4.6, 3.8)
_MAX_COLUMNS = 3
_DPI = 120
_FINISHED, _PRUNED, _BEST, _LINE = "#1f6fb4", "#9a9a9a", "#d9541e", "#2a8c4a"
_SPREAD, _GOLDEN = 0.3, 0.618  # points of one listed value lie beside each other, else they hide one another
_NUM_LOG_TICKS, _LOG_MARGIN = 5, 1.15
_NUM_TICKED = 8  # up to as many values of a list are written out level


def draw_search(path: Path, report: SearchReport) -> None:
    """Write the picture as PNG; raises InvalidRequest without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("report", "is drawn by matplotlib: pip install 'multilora[train]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    searched = {name: values for name, values in report.plan.space.items() if is_searched(values)}
    columns = 2 if len(searched) in (1, 2, 4) else _MAX_COLUMNS
    rows = 1 + math.ceil(len(searched) / columns)
    size = columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1]
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    _draw_trials(figure.add_subplot(grid[0, :]), report)
    for place, (name, values) in enumerate(searched.items()):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        _draw_parameter(axes, report, name, values)
    figure.suptitle("Hyper-parameter search", fontsize=13, fontweight="bold")
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_trials(axes: Axes, report: SearchReport) -> None:
    from matplotlib.ticker import MaxNLocator

    _scatter(axes, report, report.trials, [float(trial.number) for trial in report.trials])
    numbers, bests = _best_so_far(report)
    axes.step(numbers, bests, where="post", color=_LINE, linewidth=1.4, label="best so far", zorder=1)
    failed = [trial.number for trial in report.trials if trial.state is TrialState.FAILED]
    if failed:  # they have no value: at the foot
        axes.plot(
            failed, [0.02] * len(failed), "x", color="#b02020", transform=axes.get_xaxis_transform(), label="failed"
        )
    axes.set_xlim(0.5, len(report.trials) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.set_xlabel("trial")
    _finish(axes, report)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, fontsize=8, frameon=False)


def _best_so_far(report: SearchReport) -> tuple[list[int], list[float]]:
    numbers: list[int] = []
    bests: list[float] = []
    for trial in report.trials:
        best = report.plan.best(report.trials[: trial.number])
        if best is not None and best.metric is not None:
            numbers.append(trial.number)
            bests.append(best.metric)
    return numbers, bests


def _draw_parameter(axes: Axes, report: SearchReport, name: str, values: Range | Choice) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    trials = [trial for trial in report.trials if name in trial.values]
    if isinstance(values, Choice):
        places = {value: float(place) for place, value in enumerate(values.values)}
        spread = [_SPREAD * ((trial.number * _GOLDEN) % 1 - 0.5) for trial in trials]
        _scatter(axes, report, trials, [places[t.values[name]] + x for t, x in zip(trials, spread, strict=True)])
        slanted = len(places) > _NUM_TICKED or max(len(shown_value(value)) for value in places) > 8
        axes.set_xticks(
            list(places.values()),
            [shown_value(value) for value in places],
            rotation=20 if slanted else 0,
            ha="right" if slanted else "center",
        )
        axes.set_xlim(-0.5, len(places) - 0.5)
    else:
        _scatter(axes, report, trials, [float(trial.values[name]) for trial in trials])
        if values.log:  # whatever the span, few ticks with short labels
            steps = np.geomspace(values.low, values.high, _NUM_LOG_TICKS)
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(steps, [f"{step:.2g}" for step in steps])
            axes.set_xlim(values.low / _LOG_MARGIN, values.high * _LOG_MARGIN)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=values.whole))
            margin = 0.04 * (values.high - values.low)
            axes.set_xlim(values.low - margin, values.high + margin)
    axes.set_xlabel(name)
    _finish(axes, report)


def _scatter(axes: Axes, report: SearchReport, trials: Sequence[TrialReport], places: Sequence[float]) -> None:
    kinds: tuple[tuple[TrialState, str, dict[str, Any]], ...] = (
        (TrialState.PRUNED, "pruned, its best pass", {"facecolors": "none", "edgecolors": _PRUNED, "s": 26}),
        (TrialState.FINISHED, "finished", {"color": _FINISHED, "s": 30}),
    )
    for state, label, style in kinds:
        chosen = [(x, t.metric) for t, x in zip(trials, places, strict=True) if t.state is state and _has_value(t)]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), label=label, zorder=2, **style)
    best = [x for trial, x in zip(trials, places, strict=True) if trial.number == report.best.number]
    if best and report.best.metric is not None:
        axes.scatter(
            best,
            [report.best.metric],
            s=110,
            facecolors="none",
            edgecolors=_BEST,
            linewidths=1.8,
            label="best",
            zorder=3,
        )


def _has_value(trial: TrialReport) -> bool:
    return trial.metric is not None and math.isfinite(trial.metric)


def _finish(axes: Axes, report: SearchReport) -> None:
    metric = metric_of(report.plan.selection)
    axes.set_ylabel(metric.title)
    axes.margins(y=0.1)
    axes.grid(visible=True, linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
