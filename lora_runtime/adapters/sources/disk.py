"""Folders of the disk cache: how large they are, that they are on the disk, and that they go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def measure(folder: Path) -> int:
    """Bytes of the files below; 0 without the folder."""
    num_bytes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # deleted by hand meanwhile
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


def delete(folders: Iterable[Path]) -> None:
    """As far as it can be done: what is left is tried again at the next start."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Every file and folder below, itself included, survives a power cut once this returns."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """A file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
