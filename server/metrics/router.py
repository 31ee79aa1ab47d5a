"""`/metrics/router`: what a router asks for many times a second, written by hand since that is ten times faster."""

from __future__ import annotations

from collections.abc import Iterable

from server.metrics.collect import Sample
from server.metrics.series import SERIES, Page


def router_page(samples: Iterable[Sample]) -> str:
    """The samples that routers read, in Prometheus' text format; all are gauges of one sample."""
    lines: list[str] = []
    for name, values, value in samples:
        series = SERIES[name]
        if series.page is Page.METRICS:
            continue
        labels = ",".join(f'{label}="{_escaped(text)}"' for label, text in zip(series.labels, values, strict=True))
        lines += [
            f"# HELP {name} {_escaped(series.help, quotes=False)}",
            f"# TYPE {name} {series.kind}",
            f"{name}{{{labels}}} {value}" if labels else f"{name} {value}",
        ]
    return "\n".join([*lines, ""])


def _escaped(text: str, *, quotes: bool = True) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text
