"""deploy/grafana: what the dashboards ask for is there, and is red where the alerts are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics.series import SERIES, Page
from tests.promql import bounds_of, complaints, parsed, result_labels, series_of

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/multilora.rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
RECORDED: dict[str, str] = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS: dict[str, str] = {rule["alert"]: rule["expr"] for rule in RULES if "alert" in rule}
DASHBOARDS: dict[str, Any] = {
    path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
PANELS = [(name, panel) for name, board in DASHBOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
TARGETS = [(f"{name}: {panel['title']}", target) for name, panel in PANELS for target in panel["targets"]]

each_dashboard = pytest.mark.parametrize("board", DASHBOARDS.values(), ids=DASHBOARDS.keys())


def test_the_files_are_as_the_python_says() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.grafana.generate", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"run python -m deploy.grafana.generate\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("rate(multilora_requests[5m])", "multilora_requests is not declared"),
        ("rate(multilora_stage_seconds[5m])", "multilora_stage_seconds is not declared"),
        ("rate(multilora_requests_total_count[5m])", "multilora_requests_total_count is not declared"),
        ("multilora_lora_requests_info", "multilora_lora_requests_info is not declared"),
        ('multilora_requests_total{tenant="a"}', "multilora_requests_total has no label tenant"),
        ("sum by (tenant) (multilora_requests_total)", "which is not there"),
        ("sum by (code) (sum by (method) (multilora_requests_total))", "which is not there"),
        ('multilora:requests:rate5m{instance="a"}', "multilora:requests:rate5m has no label instance"),
    ],
)
def test_what_is_not_there_is_noticed(expression: str, why: str) -> None:
    assert why in "; ".join(complaints(expression, RECORDED))


def test_what_prometheus_would_not_read_is_noticed() -> None:
    with pytest.raises(ValueError, match="unexpected"):
        parsed("rate(multilora_requests_total)) by")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]} {target[1]['refId']}")
def test_every_expression_asks_for_what_is_there(target: tuple[str, dict[str, Any]]) -> None:
    expression, legend = target[1]["expr"], target[1]["legendFormat"]
    assert series_of(parsed(expression))
    assert list(complaints(expression, RECORDED)) == []
    if target[1]["format"] == "time_series":
        named = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert named <= result_labels(parsed(expression), RECORDED), "a legend names a label that samples have not"
    for asked in series_of(parsed(expression)):
        assert ("job", "$job") in asked.matchers, "the choice of servers counts everywhere"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_rule_asks_for_what_is_there(rule: dict[str, Any]) -> None:
    assert list(complaints(rule["expr"], RECORDED)) == []


@each_dashboard
def test_every_choice_is_of_a_label_that_is_there(board: dict[str, Any]) -> None:
    datasource, *choices = board["templating"]["list"]
    assert datasource["type"] == "datasource" and datasource["query"] == "prometheus"
    for choice in choices:
        series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", choice["query"]["query"]).groups()  # pyright: ignore
        assert list(complaints(f'{series}{{{label}=""}}', RECORDED)) == []
    known = {choice["name"] for choice in choices} | {"__rate_interval", "__range"}
    used = {
        name
        for panel in board["panels"]
        for t in panel.get("targets", ())
        for name in re.findall(r"\$(\w+)", t["expr"])
    }
    assert used <= known
    assert {choice["name"] for choice in choices} <= used


def test_every_series_is_on_a_dashboard() -> None:
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", asked.name) for _, t in TARGETS for asked in series_of(parsed(t["expr"]))
    }
    assert {name for name, series in SERIES.items() if series.page is not Page.ROUTER} - shown == set()


def test_a_panel_is_red_where_its_alert_fires() -> None:
    told = {}
    for _, panel in PANELS:
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        alert = re.search(r"the alert (\w+)", panel["description"])
        assert (alert is not None) is (len(steps) > 1)
        if alert is not None:
            assert any(steps[1]["value"] == pytest.approx(bound) for bound in bounds_of(ALERTS[alert[1]])), panel[
                "title"
            ]
            told[alert[1]] = panel["title"]
    assert told.keys() == ALERTS.keys() - {"MultiloraErrorBudgetBurnsSlowly"}


@each_dashboard
def test_panels_are_side_by_side_and_say_what_they_show(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or (panel["description"] and panel["fieldConfig"]["defaults"]["unit"])
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart_x or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


@each_dashboard
def test_dashboards_lead_to_each_other(board: dict[str, Any]) -> None:
    addresses = {f"/d/{one['uid']}" for one in DASHBOARDS.values()}
    assert len(addresses) == len(DASHBOARDS) == 4
    assert {link["url"] for link in board["links"]} == addresses - {f"/d/{board['uid']}"}


def test_grafana_finds_the_dashboards_and_prometheus() -> None:
    folder = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["isDefault"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "multilora.yaml").read_text())["providers"]
    assert provider["type"] == "file" and Path(provider["options"]["path"]).is_absolute()
