"""deploy/prometheus: every series named is declared, every alert has its runbook line, promtool agrees where it is."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics.series import SERIES, Kind, Page
from server.rpc.errors import CODES
from tests.service.harness import Harness, classify_request

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "prometheus"
RULES = [
    rule for group in yaml.safe_load((FOLDER / "multilora.rules.yaml").read_text())["groups"] for rule in group["rules"]
]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
PROMTOOL = shutil.which("promtool")

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


def names_in(expression: str) -> set[str]:
    """Names of series in a PromQL expression: those of ours, and of rules, with a histogram's suffixes."""
    without_texts = re.sub(r"\"[^\"]*\"|'[^']*'", "", expression)
    without_labels = re.sub(r"\{[^}]*\}|\b(by|without|on|ignoring)\s*\([^)]*\)", "", without_texts)
    return set(re.findall(r"\b[a-z_]*multilora[a-zA-Z0-9_:]*", without_labels))


def declared(name: str) -> bool:
    if name in SERIES:
        series = SERIES[name]
        return series.kind is not Kind.HISTOGRAM and series.page is not Page.ROUTER
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return name in RECORDED or (base != name and base in SERIES and SERIES[base].kind is Kind.HISTOGRAM)


def selectors(expression: str) -> Iterator[tuple[str, str, str]]:
    """(series, label, value or pattern) of each matcher."""
    for name, inside in re.findall(r"(multilora_\w+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', inside):
            yield name, label, value


def test_the_names_of_an_expression_are_found() -> None:
    expression = 'sum by (multilora_x) (rate(multilora_a_total{b="multilora_c"}[5m])) / multilora:d:rate5m'
    assert names_in(expression) == {"multilora_a_total", "multilora:d:rate5m"}
    assert not declared("multilora_requests"), "a counter's name ends with _total"
    assert not declared("multilora_stage_seconds"), "a histogram is asked by its buckets"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_series_of_a_rule_is_declared(rule: dict[str, Any]) -> None:
    names = names_in(rule["expr"])
    assert names
    assert {name for name in names if not declared(name)} == set()
    for name, label, value in selectors(rule["expr"]):
        assert label in SERIES[re.sub(r"_(bucket|sum|count)$", "", name)].labels
        if label == "reason" and name == "multilora_rejections_total":
            assert set(value.split("|")) <= {kind.reason for kind in CODES}


def test_every_alert_has_a_severity_and_a_runbook_and_a_unit_test() -> None:
    readme = (DEPLOY / "README.md").read_text()
    tests = (FOLDER / "multilora.rules.test.yaml").read_text()
    headings = re.findall(r"^### (\w+)\n\n(.+)", readme, re.MULTILINE)
    assert [name for name, _ in headings] == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("page", "ticket", "info")
        assert rule["annotations"]["runbook"] == f"deploy/README.md#{name.lower()}"
    fired = re.findall(r"alertname: (\w+)\n\s+eval_time: \w+\n\s+exp_alerts", tests)
    assert set(fired) >= ALERTS.keys() - {"MultiloraErrorBudgetBurnsSlowly"}


@needs_promtool
@pytest.mark.parametrize("command", [("check", "multilora.rules.yaml"), ("test", "multilora.rules.test.yaml")])
def test_promtool_accepts_the_rules(command: tuple[str, str]) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, command[0], "rules", command[1]], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
async def test_promtool_accepts_what_is_served(server: Harness) -> None:
    assert PROMTOOL is not None
    await server.inference.Classify(classify_request("spam", "one"))
    text = await server.metrics()
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_configuration_of_compose(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    text = (DEPLOY / "docker" / "prometheus.yaml").read_text().replace("/etc/prometheus", str(FOLDER))
    (tmp_path / "prometheus.yaml").write_text(text)
    done = subprocess.run(
        [PROMTOOL, "check", "config", "prometheus.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout
