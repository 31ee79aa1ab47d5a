"""Extraction and compression drawn in a terminal: a bar of matrices, a table of sites, what was and was not carried."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_runtime.svd.compress import CompressReport
from lora_runtime.svd.extract import ExtractReport
from lora_runtime.svd.report import Report, change_text, check_can_report, site_cells, summary_lines, write_report
from lora_runtime.svd.settings import SvdObserver
from lora_runtime.svd.sites import SiteReport

_MAX_CARRIED = 8  # lines of what goes whole: a large model has hundreds of norms and biases


class _Bar:
    """An `SvdObserver` that moves a bar."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("reading", total=None)

    def on_start(self, num_matrices: int) -> None:
        """Say how many there are."""
        self._bars.update(self._task, description="decomposing", total=num_matrices)

    def on_matrix(self, name: str, site: SiteReport | None) -> None:
        """One more."""
        del name, site
        self._bars.advance(self._task)


@contextmanager
def progress(console: Console) -> Generator[SvdObserver]:
    """A bar of matrices while the block runs; a log file gets none."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("matrices")
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bars:
        yield _Bar(bars)


def report_writer(folder: Path | None, console: Console) -> Callable[[Report], None]:
    """What writes a report into `folder`, or nothing for None; raises InvalidRequest where that could not be."""
    if folder is not None:
        check_can_report(folder)

    def write(report: Report) -> None:
        if folder is not None:
            names = ", ".join(path.name for path in write_report(report, folder))
            _say(console, f"report written to {folder} ({names})")

    return write


def print_extract(console: Console, report: ExtractReport) -> None:
    """The table of sites, what is carried beside LoRA, what is not, and the sums."""
    _print_sites(console, report.sites, "‖delta‖/‖W‖")
    _say(console, "carried beside LoRA:")
    shown = report.carried[:_MAX_CARRIED]
    for item in shown:
        _say(console, f"  {item.name}: {item.how}, relative change {change_text(item.relative_change)}")
    if len(report.carried) > len(shown):
        _say(console, f"  and {len(report.carried) - len(shown)} more norms and biases")
    if report.not_carried:
        _say(console, f"NOT carried ({len(report.not_carried)}): the adapter answers without these changes")
    for item in report.not_carried:
        _say(console, f"  {item.name}: {item.reason}; relative change {change_text(item.relative_change)}")
    _print_end(console, report)


def print_compress(console: Console, report: CompressReport) -> None:
    """The table of sites and the sums."""
    _print_sites(console, report.sites, "rank before")
    _print_end(console, report)


def _print_sites(console: Console, sites: Iterable[SiteReport], last: str) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("site", overflow="fold")
    for name in ("shape", "rank", "energy", "error", last):
        table.add_column(name, justify="right", no_wrap=True)
    for site in sites:
        table.add_row(*map(escape, site_cells(site)))
    console.print(table, highlight=False)


def _print_end(console: Console, report: Report) -> None:
    for line in summary_lines(report):
        _say(console, line)
    _say(console, f"adapter written to {report.out} in {report.seconds:.0f} s")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
