"""Writes that survive a power loss: a file that is synced is still lost when its folder's entry of it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lora_runtime.adapters.sources.disk import sync


def sync_file(stream: BinaryIO) -> None:
    """Make what was written durable."""
    stream.flush()
    os.fsync(stream.fileno())


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it with the usual mode, durably; one that is there is left alone."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode, exist_ok=True)
    sync(folder.parent)
