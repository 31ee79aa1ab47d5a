"""`multilora serve` refuses what it cannot serve in one line, before anything heavy is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def multilora(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from server.cli import app; app()", *arguments]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MULTILORA_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environ)


def test_help_shows_defaults_and_variables() -> None:
    done = multilora("serve", "--help")
    assert done.returncode == 0
    for word in ("--metrics-port", "MULTILORA_METRICS_PORT", "50051"):
        assert word in done.stdout


def test_help_lists_the_commands_of_other_modules() -> None:
    done = multilora("--help")
    assert done.returncode == 0
    assert "serve" in done.stdout
    assert "train" in done.stdout


def test_a_missing_folder_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = multilora("serve", "--auth", "none", "--base", "x", "--adapters", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not a folder" in done.stderr


def test_a_taken_port_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = multilora("serve", "--auth", "none", "--base", "x", "--adapters", str(tmp_path), "--port", port)
    assert done.returncode == 1
    assert "is in use" in done.stderr
    assert "Traceback" not in done.stderr
