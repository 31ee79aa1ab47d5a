"""Settings: flags over variables over defaults, and faults that name their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.settings import ServeSettings, SettingsError, resolve_settings


def resolve(tmp_path: Path, environ: dict[str, str] | None = None, **flags: Any) -> ServeSettings:
    return resolve_settings({"auth": "none", "base": "encoder", "adapters": tmp_path, **flags}, environ or {})


def test_a_flag_wins_over_its_variable_and_both_over_the_default(tmp_path: Path) -> None:
    environ = {"MULTILORA_PORT": "7000", "MULTILORA_METRICS_PORT": "7001", "MULTILORA_MAX_INPUTS": ""}
    settings = resolve(tmp_path, environ, port=8000, metrics_port=None)
    assert (settings.port, settings.metrics_port, settings.max_inputs) == (8000, 7001, 256)


def test_a_switch_is_yes_or_no(tmp_path: Path) -> None:
    assert resolve(tmp_path).refuse_early
    assert not resolve(tmp_path, refuse_early="no").refuse_early
    assert not resolve(tmp_path, {"MULTILORA_PREPACK": "no"}).prepack


def test_preload_is_a_list_separated_by_commas(tmp_path: Path) -> None:
    assert resolve(tmp_path, preload="a, b@2,").preload == ("a", "b@2")
    assert resolve(tmp_path, {"MULTILORA_PRELOAD": "a"}).preload == ("a",)


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = resolve(tmp_path)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"base": None}, {}, r"--base is required \(or MULTILORA_BASE\)"),
        ({"port": 70000}, {}, "--port: .*65535"),
        ({}, {"MULTILORA_PORT": "abc"}, "MULTILORA_PORT: .*integer"),
        ({"adapters": Path("absent")}, {}, "--adapters: absent is not a folder"),
        ({"preload": "a,b c"}, {}, "--preload: 'b c' is not a name"),
        ({"refuse_early": "maybe"}, {}, "--refuse-early: 'maybe' is neither yes nor no"),
        ({}, {"MULTILORA_PREPACK": "2"}, "MULTILORA_PREPACK: '2' is neither yes nor no"),
        ({"max_inputs": 0}, {}, "--max-inputs: .*greater than or equal to 1"),
        ({"max_inputs": 10, "max_queued_sequences": 5}, {}, "--max-queued-sequences 5 is less"),
        ({"grace": -1.0}, {}, "--grace: "),
        ({"log_level": "loud"}, {}, "--log-level: .*debug"),
    ],
)
def test_a_fault_names_its_place(tmp_path: Path, flags: dict[str, Any], environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        resolve(tmp_path, environ, **flags)
    assert "\n" not in str(caught.value)
