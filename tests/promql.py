"""What a PromQL expression asks for: its series, and the labels of its result."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser

from server.metrics.series import SERIES, Kind, Page

TARGET_LABELS = frozenset({"job", "instance"})  # Prometheus adds them to every series that it reads
_SUFFIX = re.compile(r"_(bucket|sum|count)$")
_GRAFANA = {"$__rate_interval": "5m", "$__range": "1h", "$__interval": "1m"}


@dataclass(frozen=True)
class Asked:
    """A series with the labels and values that it is chosen by."""

    name: str
    matchers: tuple[tuple[str, str], ...]


def parsed(text: str) -> Any:
    """The syntax tree, Grafana's intervals filled in. Raises ValueError for what Prometheus would not read."""
    for name, value in _GRAFANA.items():
        text = text.replace(f"[{name}]", f"[{value}]")
    return promql_parser.parse(text)


def series_of(tree: Any) -> list[Asked]:
    return [
        Asked(node.name, tuple((matcher.name, matcher.value) for matcher in node.matchers.matchers))
        for node in nodes(tree)
        if isinstance(node, promql_parser.VectorSelector)
    ]


def nodes(tree: Any) -> Iterator[Any]:
    yield tree
    for part in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (below := getattr(tree, part, None)) is not None:
            yield from nodes(below)
    for argument in getattr(tree, "args", ()):
        yield from nodes(argument)


def labels_of(name: str, recorded: dict[str, str]) -> frozenset[str] | None:
    """The labels of a series that Prometheus has; None for one that is not declared. `recorded`: rules and PromQL."""
    if name in recorded:
        return result_labels(parsed(recorded[name]), recorded)
    base = _SUFFIX.sub("", name)
    series = SERIES.get(name) or SERIES.get(base)
    if series is None or series.page is Page.ROUTER or (series.kind is Kind.HISTOGRAM) is (base == name):
        return None
    bucket = {"le"} if name.endswith("_bucket") else set[str]()
    return TARGET_LABELS | {*series.labels} | bucket


def result_labels(tree: Any, recorded: dict[str, str]) -> frozenset[str]:
    """The labels that samples of the result have; those of the left side where two are combined."""
    if isinstance(tree, promql_parser.AggregateExpr) and tree.modifier is not None:
        assert tree.modifier.type == promql_parser.AggModifierType.By, "say which labels stay"
        return frozenset(tree.modifier.labels)
    if isinstance(tree, promql_parser.AggregateExpr) and str(tree.op) not in ("topk", "bottomk"):
        return frozenset()
    if isinstance(tree, promql_parser.VectorSelector):
        return labels_of(tree.name, recorded) or frozenset()
    if isinstance(tree, promql_parser.BinaryExpr):
        return result_labels(tree.lhs, recorded) or result_labels(tree.rhs, recorded)
    below = [part for part in (getattr(tree, "expr", None), getattr(tree, "vector_selector", None)) if part is not None]
    found = [result_labels(part, recorded) for part in (*below, *getattr(tree, "args", ()))]
    dropped = {"le"} if getattr(getattr(tree, "func", None), "name", "") == "histogram_quantile" else set[str]()
    return frozenset().union(*found) - dropped


def complaints(text: str, recorded: dict[str, str]) -> Iterator[str]:
    """What is wrong with an expression: series that nobody declares, and labels that a series has not."""
    tree = parsed(text)
    for asked in series_of(tree):
        known = labels_of(asked.name, recorded)
        if known is None:
            yield f"{asked.name} is not declared"
            continue
        yield from (f"{asked.name} has no label {label}" for label, _ in asked.matchers if label not in known)
    for node in nodes(tree):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            inside = result_labels(node.expr, recorded)
            yield from (
                f"{node} keeps {label}, which is not there" for label in node.modifier.labels if label not in inside
            )


def bounds_of(text: str) -> set[float]:
    """The numbers that an alert compares with."""
    comparisons = {">", "<", ">=", "<="}
    return {
        value
        for node in nodes(parsed(text))
        if isinstance(node, promql_parser.BinaryExpr) and str(node.op) in comparisons
        if (value := _number(node.rhs)) is not None
    }


def _number(tree: Any) -> float | None:
    if isinstance(tree, promql_parser.NumberLiteral):
        return float(tree.val)
    if isinstance(tree, promql_parser.ParenExpr):
        return _number(tree.expr)
    if isinstance(tree, promql_parser.BinaryExpr) and str(tree.op) == "*":
        sides = _number(tree.lhs), _number(tree.rhs)
        return None if sides[0] is None or sides[1] is None else sides[0] * sides[1]
    return None
