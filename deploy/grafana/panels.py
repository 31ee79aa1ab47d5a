"""Grafana's JSON of panels and dashboards, from as little as a reader wants to write and review."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.metrics.series import SERIES

Json = dict[str, Any]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24  # columns of Grafana's grid
_NAME = re.compile(r"multilora_[a-z_]+")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True, slots=True)
class Limit:
    """Where a panel turns red: where that alert of deploy/prometheus begins."""

    value: float
    alert: str
    below: bool = False  # red below it


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `queries` are pairs of PromQL and legend; `kind` is Grafana's name of the panel's type."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    limit: Limit | None = None
    width: int = 8
    height: int = 8
    stack: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A heading; the panels after it are below it."""

    title: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice above the dashboard: `label` of `series`, all of its values at first."""

    label: str
    series: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    name: str
    title: str
    text: str
    items: tuple[Panel | Row, ...]
    variables: tuple[Variable, ...] = ()


def lines(title: str, unit: str, *queries: tuple[str, str], **more: Any) -> Panel:
    return Panel(title, unit, queries, **more)


def stat(title: str, unit: str, expression: str, limit: Limit | None = None, text: str = "") -> Panel:
    return Panel(title, unit, ((expression, ""),), "stat", limit, width=3, height=4, text=text)


def table(title: str, unit: str, *queries: tuple[str, str], **more: Any) -> Panel:
    """A row per label set, a column per query, now."""
    return Panel(title, unit, queries, "table", **more)


def heatmap(title: str, unit: str, expression: str, **more: Any) -> Panel:
    return Panel(title, unit, ((expression, "{{le}}"),), "heatmap", **more)


def to_json(dashboard: Dashboard, others: Sequence[Dashboard]) -> Json:
    """The dashboard as Grafana imports it, with links to the others."""
    return {
        "uid": f"multilora-{dashboard.name}",
        "title": f"multilora / {dashboard.title}",
        "description": dashboard.text,
        "tags": ["multilora"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "title": other.title,
                "type": "link",
                "url": f"/d/multilora-{other.name}",
                "keepTime": True,
                "includeVars": True,
            }
            for other in others
            if other is not dashboard
        ],
        "templating": {"list": [_DATASOURCE_VARIABLE, *map(_variable, dashboard.variables)]},
        "annotations": {"list": []},
        "panels": list(_panels(dashboard.items)),
    }


_DATASOURCE_VARIABLE: Json = {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"}


def _variable(variable: Variable) -> Json:
    query = f"label_values({variable.series}, {variable.label})"
    return {
        "name": variable.label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": variable.label},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels(items: Sequence[Panel | Row]) -> Iterator[Json]:
    """From left to right, then below; a row begins anew."""
    x = y = height = 0
    for number, item in enumerate(items, 1):
        size = (_WIDTH, 1) if isinstance(item, Row) else (item.width, item.height)
        if x + size[0] > _WIDTH or isinstance(item, Row):
            x, y, height = 0, y + height, 0
        place = {"x": x, "y": y, "w": size[0], "h": size[1]}
        yield {"id": number, "gridPos": place, **(_row(item) if isinstance(item, Row) else _panel(item))}
        x, height = x + size[0], max(height, size[1])


def _row(row: Row) -> Json:
    return {"type": "row", "title": row.title, "collapsed": False, "panels": []}


def _panel(panel: Panel) -> Json:
    is_table, is_heatmap = panel.kind == "table", panel.kind == "heatmap"
    is_now = panel.kind in ("table", "bargauge")
    targets = [
        {
            "refId": chr(ord("A") + place),
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend or "__auto",
            "instant": is_now,
            "range": not is_now,
            "format": "table" if is_table else "heatmap" if is_heatmap else "time_series",
        }
        for place, (expression, legend) in enumerate(panel.queries)
    ]
    made: Json = {
        "type": panel.kind,
        "title": panel.title,
        "description": _description(panel),
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
    }
    if is_table:
        made["transformations"] = [
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True, "__name__": True},
                    "renameByName": {
                        f"Value #{target['refId']}" if len(targets) > 1 else "Value": target["legendFormat"]
                        for target in targets
                    },
                },
            },
        ]
    return made


def _description(panel: Panel) -> str:
    """What the series say of themselves, and what to do when it is red."""
    names = dict.fromkeys(
        _SUFFIX.sub("", name) for expression, _ in panel.queries for name in _NAME.findall(expression)
    )
    helps = dict.fromkeys(SERIES[name].help for name in names if name in SERIES)
    alert = f"Red as the alert {panel.limit.alert} says: see the runbook in deploy/README.md." if panel.limit else ""
    return " ".join(part for part in (panel.text, *(() if panel.text else helps), alert) if part)


def _defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": _steps(panel.limit)}}
    if panel.unit == "percentunit":
        defaults["min"] = 0
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 25 if panel.stack else 5,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if panel.limit else "off"},
        }
    if panel.kind == "timeseries" or panel.limit is None:
        defaults["color"] = {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"}
    return defaults


def _steps(limit: Limit | None) -> list[Json]:
    if limit is None:
        return [{"color": "green", "value": None}]
    colors = ("red", "green") if limit.below else ("green", "red")
    return [{"color": colors[0], "value": None}, {"color": colors[1], "value": limit.value}]


_OPTIONS: dict[str, Json] = {
    "alertlist": {"viewMode": "list", "maxItems": 20, "sortOrder": 3, "stateFilter": {"firing": True, "pending": True}},
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
    "bargauge": {"reduceOptions": {"calcs": ["lastNotNull"]}, "displayMode": "basic", "orientation": "horizontal"},
    "table": {"showHeader": True, "cellHeight": "sm"},
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 32},
        "yAxis": {"axisPlacement": "left"},
        "cellGap": 1,
        "tooltip": {"mode": "single", "yHistogram": False},
    },
}
