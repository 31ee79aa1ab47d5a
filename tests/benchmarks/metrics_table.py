"""The README's table of series, from the one in which they are declared."""

from __future__ import annotations

from server.metrics.series import GROUPS, Page, Series


def metrics_table() -> str:
    """A row for each series, by what it is about."""
    lines = ["| series | kind | unit | labels | what |", "|---|---|---|---|---|"]
    for group, declared in GROUPS.items():
        lines.append(f"| **{group}** | | | | |")
        lines += [_row(name, series) for name, series in declared.items()]
    return "\n".join([*lines, ""])


def _row(name: str, series: Series) -> str:
    labels = ", ".join(f"`{label}`" for label in series.labels)
    mark = "" if series.page is Page.METRICS else " ʳ"
    return f"| `{name}`{mark} | {series.kind} | {series.unit} | {labels} | {series.help} |"
