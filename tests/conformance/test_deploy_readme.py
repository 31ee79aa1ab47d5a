"""deploy/README.md says what is so: commands, flags, services and files in it exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from server.cli import app
from server.metrics.series import SERIES
from server.settings import ServeSettings, variable_of
from tests.conformance.test_readme import flags_of

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]
OTHERS = {
    "--detach",
    "--build-arg",
    "--cert",
    "--key",
    "--from-file",
    "--rm",
    "--no-deps",
    "--target",
    "--pull",
    "--signal",
    "--web",
    "--help",
}  # of Docker and Prometheus
OF_CLIENTS = {"MULTILORA_TOKEN"}


def test_every_command_named_exists() -> None:
    group: Any = get_command(app)
    asked = re.findall(r"(?:multilora|server) (adapters|keys|serve)(?: (?!is|the)([a-z]+))?", README)
    assert {("adapters", "alias"), ("keys", "create"), ("keys", "revoke")} <= set(asked)
    for name, below in asked:
        command = group.get_command(None, name)
        assert command is not None
        if below and hasattr(command, "get_command"):
            assert command.get_command(None, below) is not None, below


def test_every_flag_named_exists() -> None:
    known = {*flags_of(get_command(app)), *OTHERS}
    assert set(re.findall(r"(?<=[\s`(])--[a-z][a-z-]+", README)) <= known


def test_every_setting_and_series_named_exists() -> None:
    assert set(re.findall(r"MULTILORA_[A-Z_]+\b", README)) - OF_CLIENTS <= set(
        map(variable_of, ServeSettings.model_fields)
    )
    names = set(re.findall(r"multilora_[a-z_]+", README))
    assert names and names <= SERIES.keys()


def test_every_service_named_is_in_compose() -> None:
    named = re.findall(r"docker compose (?:build|run|up|kill)((?: --[a-z-]+(?: SIGHUP)?)*)((?: [a-z]+)?)", README)
    services = {service.strip() for _, service in named} - {""}
    assert {"server", "bucket", "prometheus"} <= services <= SERVICES.keys()


def test_every_file_named_is_there() -> None:
    files = re.findall(r"`((?:docker|grafana|prometheus)/[\w./*-]*)`", README)
    assert len(files) > 8
    for file in files:
        assert list(DEPLOY.glob(file)), file
