"""One file from a store to the disk, in pieces, resumed where an earlier attempt ended."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from lora_runtime.adapters.sources.faults import at_store
from lora_runtime.adapters.sources.urls import shown_url
from lora_runtime.errors import LoadCancelled, SourceUnavailable

PIECE_BYTES = 1 << 20
PART = ".part"


class _NoRanges(Exception):
    """The server sends whole files only."""


def download(filesystem: Any, path: str, num_bytes: int, target: Path, url: str, stop: threading.Event) -> None:
    """Write `target`, which appears complete or not at all. Raises OSError for our disk, and as a source does."""
    part = target.with_name(f"{target.name}{PART}")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    have = have if have <= num_bytes else 0
    try:
        _copy(filesystem, path, have, num_bytes, part, url, stop, PIECE_BYTES)
    except _NoRanges:
        _copy(filesystem, path, 0, num_bytes, part, url, stop, 0)
    part.replace(target)


def _copy(
    filesystem: Any, path: str, have: int, num_bytes: int, part: Path, url: str, stop: threading.Event, block: int
) -> None:
    """From byte `have` on; `block` 0 reads one answer from its start, else each piece is a request of its own."""
    with part.open("r+b" if have else "wb") as ours:
        ours.seek(have)
        ours.truncate()
        if have == num_bytes:
            return
        with at_store(url):
            theirs = filesystem.open(path, "rb", block_size=block, cache_type="none")
        try:
            while have < num_bytes:
                if stop.is_set():
                    raise LoadCancelled(shown_url(url))
                piece = _read(theirs, have, min(PIECE_BYTES, num_bytes - have), block, url)
                if not piece:
                    raise SourceUnavailable(shown_url(url), f"{part.stem} ended after {have} of {num_bytes} bytes")
                ours.write(piece)
                have += len(piece)
        finally:
            with at_store(url):
                theirs.close()


def _read(theirs: Any, start: int, num_bytes: int, block: int, url: str) -> bytes:
    with at_store(url):
        try:
            if block:
                theirs.seek(start)
            return theirs.read(num_bytes)
        except (ValueError, NotImplementedError):  # what fsspec raises where a server has no ranges
            if not block:
                raise
    raise _NoRanges
