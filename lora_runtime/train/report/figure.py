"""A report's picture: losses and metrics over the run, and the confusion matrix of up to 40 labels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.metrics.names import Unit, metric_of
from lora_runtime.train.report.fonts import DEFAULT, font_for
from lora_runtime.train.report.run import Confusion, HistoryPoint, RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MAX_MATRIX_LABELS = 40
MAX_LABEL_CHARS = 22
MAX_TITLE_CHARS = 90
_COUNTED_LABELS = 20  # up to as many, each cell shows its count
_PANEL_INCHES = (4.8, 4.2)
_DPI = 120
_BAR_INCHES = 0.25  # the colour bar's breadth, and its distance from the matrix
_MARKED_POINTS = 30  # up to as many have a marker each
_MARKERS = "os^Dvp"
_DASHES = (0, (4, 3))
_GREY = "#555555"
_COLOURS = ("#1f6fb4", "#d9541e", "#2a8c4a", "#8a4fb0", "#b08a1f", "#444444")


def draw_figure(path: Path, report: RunReport) -> None:
    """Write the picture as PNG; raises InvalidRequest without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("report", "is drawn by matplotlib: pip install 'multilora[train]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units = _units(report)
    matrix = report.confusion if _fits(report.confusion) else None
    width = max(1 + len(units), 2) * _PANEL_INCHES[0]
    heights = [_PANEL_INCHES[1]]
    if matrix is not None:
        side = _matrix_inches(len(matrix.labels))
        width, heights = max(width, side + 1.5), [*heights, side]
    figure = Figure(figsize=(width, sum(heights)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = parts[0].subplots(1, 1 + len(units), squeeze=False)[0]
    _draw_losses(panels[0], report)
    for axes, unit in zip(panels[1:], units, strict=True):
        _draw_metrics(axes, report, unit)
    if matrix is not None:
        _draw_matrix(parts[1], parts[1].subplots(), matrix)
    _title(figure, report.title)
    figure.savefig(path, format="png", metadata={"Software": None})


def _units(report: RunReport) -> list[Unit]:
    """The axes that the metrics need, in the order in which metrics are listed."""
    names = dict.fromkeys(name for point in report.history for name in point.metrics)
    return list(dict.fromkeys(metric_of(name).unit for name in names))


def _fits(confusion: Confusion | None) -> bool:
    return confusion is not None and len(confusion.labels) <= MAX_MATRIX_LABELS


def _draw_losses(axes: Axes, report: RunReport) -> None:
    _curve(axes, report.history, [point.train_loss for point in report.history], "training", 0)
    _curve(axes, report.history, [point.valid_loss for point in report.history], "validation", 1)
    axes.set_title("Loss", fontsize=11)
    axes.set_ylabel("loss, mean of a row or token")
    _finish(axes, report)


def _draw_metrics(axes: Axes, report: RunReport, unit: Unit) -> None:
    from matplotlib.lines import Line2D

    names = dict.fromkeys(name for point in report.history for name in point.metrics)
    shared = [name for name in names if metric_of(name).unit is unit]
    bases: list[float] = []
    for index, name in enumerate(shared):
        values = [point.metrics.get(name) for point in report.history]
        _curve(axes, report.history, values, metric_of(name).title, index)
        if math.isfinite(base := report.baseline.get(name, math.nan)):
            axes.axhline(base, color=_colour(index), linestyle=_DASHES, linewidth=1.1)
            bases.append(base)
    if bases:  # one entry for all of them: each has its metric's colour
        axes.add_line(Line2D([], [], color=_GREY, linestyle=_DASHES, linewidth=1.1, label=report.baseline_of))
    axes.set_title(_heading(shared), fontsize=11)
    axes.set_ylabel(str(unit))
    _finish(axes, report)


def _curve(axes: Axes, history: Sequence[HistoryPoint], values: Sequence[float | None], label: str, index: int) -> None:
    """The later of two equal curves is the thinner, so that both are seen."""
    drawn = [value if value is not None and math.isfinite(value) else math.nan for value in values]
    if all(map(math.isnan, drawn)):
        return
    axes.plot(
        [point.epoch for point in history],
        drawn,
        marker=_MARKERS[index % len(_MARKERS)] if len(history) <= _MARKED_POINTS else "",
        markersize=max(7.0 - index, 4.0),
        linewidth=max(3.0 - 0.8 * index, 1.2),
        color=_colour(index),
        label=label,
    )


def _heading(names: Sequence[str]) -> str:
    title = metric_of(names[0]).title if len(names) == 1 else "validation metrics"
    return title[:1].upper() + title[1:]


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _finish(axes: Axes, report: RunReport) -> None:
    """What all curves share: epochs, the best one, grid and legend."""
    from matplotlib.ticker import MaxNLocator

    axes.axvline(report.best.epoch, color=_GREY, linestyle=":", linewidth=1.3, label="kept weights")
    first, last = report.history[0].epoch, report.history[-1].epoch
    margin = 0.5 if first == last else 0.04 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    whole = all(point.epoch == int(point.epoch) for point in report.history)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=whole, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")
    axes.margins(y=0.08)
    axes.grid(visible=True, linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    # below the axes, where it covers no curve
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False)


def _matrix_inches(num_labels: int) -> float:
    return min(12.0, 3.2 + 0.34 * num_labels)


def _draw_matrix(figure: SubFigure, axes: Axes, confusion: Confusion) -> None:
    counts = np.asarray(confusion.counts, dtype=np.int64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.where(totals > 0, totals, 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    breadth = _BAR_INCHES / _matrix_inches(len(counts))
    bar = figure.colorbar(image, cax=axes.inset_axes((1 + breadth, 0.08, breadth, 0.84)))
    bar.set_label("share of the true label's rows")
    names, font, named = _names(confusion.labels)
    ticks = np.arange(len(names))
    longest = max(map(len, names))
    long = longest > 12 or (longest > 3 and len(names) > 6)
    size = 9 if len(names) <= 20 else 7.5
    axes.set_xticks(ticks, names, rotation=45 if long else 0, ha="right" if long else "center", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set(fontsize=size, fontfamily=font, parse_math=False)
    axes.set_xlabel("answered label" if named else "answered label (its number in the table of labels, from 1)")
    axes.set_ylabel("true label")
    axes.set_title("Confusion matrix, validation rows", fontsize=11)
    if len(names) <= _COUNTED_LABELS:
        _write_counts(axes, counts, shares)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    size = 9 if len(counts) <= 12 else 7.5
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.55 else "#222222"
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=size, color=colour)


def _names(labels: Sequence[str]) -> tuple[list[str], str, bool]:
    """Labels cut to what an axis holds, their font, and whether they are names: numbers where no font has them."""
    cut = [label if len(label) <= MAX_LABEL_CHARS else label[: MAX_LABEL_CHARS - 1] + "…" for label in labels]
    font = font_for(cut)
    if font is None:
        return [str(number) for number in range(1, len(labels) + 1)], DEFAULT, False
    return cut, font, True


def _title(figure: Figure, title: str) -> None:
    """The report's title, left out where no font has its letters."""
    line = " ".join(title.split())
    line = line if len(line) <= MAX_TITLE_CHARS else line[: MAX_TITLE_CHARS - 1] + "…"
    if (font := font_for([line])) is not None:
        figure.suptitle(line, fontfamily=font, fontsize=13, fontweight="bold").set_parse_math(False)
