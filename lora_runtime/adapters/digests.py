"""Content hashes of an adapter's files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of one file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each named file of `folder`."""
    return {name: file_sha256(folder / name) for name in sorted(names)}


def content_digest(files: Mapping[str, tuple[int, str]]) -> str:
    """The identity of an adapter: SHA-256 over its files, each name with (bytes, SHA-256)."""
    total = hashlib.sha256()
    for name, (num_bytes, sha256) in sorted(files.items()):
        total.update(f"{name}\0{num_bytes}\0{sha256}\n".encode())
    return total.hexdigest()
