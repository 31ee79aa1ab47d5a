"""A report as Markdown: results, history, labels, confusions, examples, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lora_runtime.errors import shown
from lora_runtime.train.metrics.classes import LabelScore
from lora_runtime.train.metrics.names import metric_of, shown_value
from lora_runtime.train.report.run import Confusion, Example, HistoryPoint, RunReport

MAX_HISTORY_ROWS = 60
MAX_CONFUSIONS = 20
MAX_EXAMPLES = 20
MAX_TEXT_CHARS = 160  # of a text in a table

_MARKUP = re.compile(r"([\\`*_\[\]<>|#~$])")


def render_markdown(report: RunReport, figure: str) -> str:
    """The whole of `report.md`; `figure` is the name of the picture beside it."""
    sections = [
        f"# {escape(report.title)}",
        _summary(report),
        _section("Result", _results(report)),
        *(_section(title, content) for title, content in report.sections.items()),
        f"![Loss and metrics over the run]({figure})",
        _section("History", _history(report)),
        _section("Labels", _labels(report.label_scores)),
        _section("Most confused labels", _confusions(report.confusion)),
        _section("Examples", _examples(report.examples)),
        _section("Settings", table(("setting", "value"), _pairs(report.settings))),
        _section("Versions", table(("package", "version"), _pairs(report.versions))),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escape(text: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """One line of text that Markdown shows as it is, cut to `max_chars`."""
    line = shown(" ".join(text.split()))
    line = line if len(line) <= max_chars else line[: max_chars - 1] + "…"
    return _MARKUP.sub(r"\\\1", line)


def _summary(report: RunReport) -> str:
    rows = ", ".join(f"{count:,} {escape(name)}" for name, count in report.rows.items())
    lines = [
        f"- task: {escape(report.task)}",
        f"- base: {escape(report.base)}",
        f"- rows: {rows}",
        f"- best: epoch {_number(report.best.epoch)}, step {report.best.step}, by {_title(report.selected_by)}",
        f"- time: {duration(report.seconds)}",
    ]
    return "\n".join(lines)


def _results(report: RunReport) -> str:
    names = [*report.best.metrics, *(name for name in report.baseline if name not in report.best.metrics)]
    rows = [(_title(name), _value(report.best.metrics, name), _value(report.baseline, name)) for name in names]
    rows.append(("validation loss", _loss(report.best.valid_loss), ""))
    return table(("metric", "trained", escape(report.baseline_of)), rows, "lrr")


def _history(report: RunReport) -> str:
    names = list(dict.fromkeys(name for point in report.history for name in point.metrics))
    points = _thinned(report.history, report.best)
    header = ("step", "epoch", "train loss", "validation loss", *map(_title, names), "")
    passes = table(header, (_history_row(point, names, point == report.best) for point in points), "r" * len(header))
    if len(points) == len(report.history):
        return passes
    return f"{len(points)} of {len(report.history)} validation passes, evenly spread.\n\n{passes}"


def _history_row(point: HistoryPoint, names: Sequence[str], best: bool) -> tuple[str, ...]:
    losses = (_loss(point.train_loss), _loss(point.valid_loss))
    return str(point.step), _number(point.epoch), *losses, *(_value(point.metrics, n) for n in names), "best" * best


def _thinned(history: tuple[HistoryPoint, ...], best: HistoryPoint) -> list[HistoryPoint]:
    """All points, or as many as are shown: the last and the best among them."""
    if len(history) <= MAX_HISTORY_ROWS:
        return list(history)
    last = len(history) - 1
    kept = {round(index * last / (MAX_HISTORY_ROWS - 1)) for index in range(MAX_HISTORY_ROWS)} | {history.index(best)}
    return [history[index] for index in sorted(kept)]


def _labels(scores: Sequence[LabelScore]) -> str:
    rows = (
        (str(number), escape(s.label), f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f}", f"{s.support:,}")
        for number, s in enumerate(scores, start=1)
    )
    return table(("", "label", "precision", "recall", "F1", "support"), rows, "rlrrrr")


def _confusions(confusion: Confusion | None) -> str:
    if confusion is None:
        return ""
    names, counts = confusion.labels, confusion.counts
    pairs = [(int(n), i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows = (
        (escape(names[i]), escape(names[j]), f"{n:,}", f"{100 * n / sum(map(int, counts[i])):.1f} %")
        for n, i, j in pairs[:MAX_CONFUSIONS]
    )
    return table(("true", "answered", "rows", "of the true label"), rows, "llrr")


def _examples(examples: Sequence[Example]) -> str:
    rows = ((escape(e.given), escape(e.expected), escape(e.answered)) for e in examples[:MAX_EXAMPLES])
    return table(("input", "expected", "answered"), rows)


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A table, "" without rows; `align` has l or r for each column."""
    lines = [_line(row) for row in rows]
    if not lines:
        return ""
    marks = ("---:" if mark == "r" else "---" for mark in align.ljust(len(header), "l"))
    return "\n".join((_line(header), _line(tuple(marks)), *lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pairs(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        yield escape(name), escape(_setting(value))


def _setting(value: object) -> str:
    if isinstance(value, (set, frozenset)):
        return ", ".join(sorted(map(str, value)))  # whose own order changes from run to run
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _title(name: str) -> str:
    return escape(metric_of(name).title)


def _value(metrics: Mapping[str, float], name: str) -> str:
    return shown_value(name, metrics[name]) if name in metrics else ""


def _loss(loss: float | None) -> str:
    return "" if loss is None or math.isnan(loss) else f"{loss:.4f}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
