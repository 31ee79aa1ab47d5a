"""Regenerate the Python stubs in `server/pb` from the protos beside this file.

    python protos/generate.py           # write server/pb
    python protos/generate.py --check   # exit 1 and name the files that differ from what the protos give

The stubs are committed, so that installing the server needs no compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
STUBS = PROTOS.parent / "server" / "pb"
PACKAGE = "server.pb"
# The oldest tools the project allows write a version check into the stubs; newer patch releases of the same
# tools write only another number, which is no reason to call the stubs stale.
_VERSION_LINE = re.compile(r"^(GRPC_GENERATED_VERSION = |# Protobuf Python Version: ).*$", re.MULTILINE)
_IMPORT = re.compile(r"^(from|import) (multilora|open_inference)\b", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Regenerate or check the stubs in server/pb.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the stubs are stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
    if check:
        return report(stale_files(fresh))
    write(fresh)
    print(f"wrote {len(fresh)} files to {STUBS.relative_to(PROTOS.parent)}")
    return 0


def generate(out: Path) -> dict[str, str]:
    """Run protoc into `out`; returns path below server/pb → content, packages' `__init__.py` included."""
    import grpc_tools

    scripts = Path(sysconfig.get_path("scripts"))
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        f"--proto_path={PROTOS}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        *(f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")),
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *sources,
    ]
    done = subprocess.run(command, cwd=PROTOS, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"protoc failed:\n{done.stderr}")
    files = {str(path.relative_to(out)): adapt(path.read_text()) for path in out.rglob("*.py*")}
    for folder in {parent for name in files for parent in Path(name).parents}:
        files[str(folder / "__init__.py")] = ""
    files["__init__.py"] = f'"""Generated from protos/ by protos/generate.py; import from {PACKAGE}.<package>."""\n'
    return dict(sorted(files.items()))


def adapt(text: str) -> str:
    """Move imports of our own packages below `server.pb`, so that no top-level package is claimed."""
    text = _IMPORT.sub(rf"\1 {PACKAGE}.\2", text)
    return text.rstrip("\n") + "\n"


def write(files: dict[str, str]) -> None:
    for path in existing_files():
        if path not in files:
            (STUBS / path).unlink()
    for path, text in files.items():
        target = STUBS / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def existing_files() -> list[str]:
    return [str(path.relative_to(STUBS)) for path in STUBS.rglob("*.py*") if "__pycache__" not in path.parts]


def stale_files(fresh: dict[str, str]) -> list[str]:
    """One line per stub that is missing, differs, or has no proto any more."""
    existing = set(existing_files())
    lines = [f"{path}: no proto gives it" for path in sorted(existing - fresh.keys())]
    for path, text in fresh.items():
        if path not in existing:
            lines.append(f"{path}: missing")
        elif _VERSION_LINE.sub("", (STUBS / path).read_text()) != _VERSION_LINE.sub("", text):
            lines.append(f"{path}: differs")
    return lines


def report(stale: list[str]) -> int:
    if not stale:
        print("server/pb is current")
        return 0
    print("server/pb is stale; run `python protos/generate.py` and commit the result:", file=sys.stderr)
    for line in stale:
        print(f"  server/pb/{line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
