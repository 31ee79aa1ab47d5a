"""The protos are clean and documented, and the committed stubs are theirs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATE = [sys.executable, "protos/generate.py", "--check"]


def test_stubs_are_current() -> None:
    done = subprocess.run(GENERATE, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_stub_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copytree(ROOT / "server" / "pb", tmp_path / "server" / "pb")
    proto = tmp_path / "protos" / "multilora" / "v1" / "inference.proto"
    proto.write_text(proto.read_text().replace("bool return_logits = 4;", "bool return_logits = 40;"))
    done = subprocess.run(GENERATE, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "server/pb/multilora/v1/inference_pb2.py: differs" in done.stderr
    assert "common_pb2" not in done.stderr


def test_protos_pass_the_linter_which_also_demands_documentation() -> None:
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    assert "COMMENTS" in (ROOT / "protos" / "buf.yaml").read_text()
    done = subprocess.run([buf, "lint"], cwd=ROOT / "protos", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
