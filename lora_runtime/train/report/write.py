"""Writing a report."""

from __future__ import annotations

from pathlib import Path

from lora_runtime.train.report.figure import draw_figure
from lora_runtime.train.report.markdown import render_markdown
from lora_runtime.train.report.run import RunReport

MARKDOWN_FILE = "report.md"
FIGURE_FILE = "report.png"


def write_report(folder: Path, report: RunReport) -> None:
    """Write `report.md` and `report.png` into a folder that exists; the same report gives the same report.md.

    Raises InvalidRequest when matplotlib is not installed, before anything is written.
    """
    draw_figure(folder / FIGURE_FILE, report)
    (folder / MARKDOWN_FILE).write_text(render_markdown(report, FIGURE_FILE), encoding="utf-8", newline="\n")
