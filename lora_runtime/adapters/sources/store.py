"""Adapters in a store that fsspec reaches: s3, gs, abfs, http, memory and others.

Credentials are those that fsspec's implementations read from the environment; a URL that carries any is refused.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.adapters.sources.listing import Entry, list_adapter, open_store, revision_of
from lora_runtime.adapters.sources.names import check_size
from lora_runtime.adapters.sources.transfer import download
from lora_runtime.adapters.sources.urls import shown_url
from lora_runtime.errors import AdapterRejected, LoadCancelled

_REVISION_FILE = ".revision"  # beside the parts: what they are parts of


class StoreSource:
    """Any URL of fsspec. What is pinned is the listing: names, sizes and etags."""

    def resolve(self, url: str, stop: threading.Event) -> Origin:
        """List the files at `url`."""
        url = url.rstrip("/")
        revision = revision_of(list_adapter(url))
        _check(stop, url)
        return Origin(url, revision)

    def fetch(self, origin: Origin, into: Path, max_bytes: int, stop: threading.Event) -> None:
        """Download what is not there yet; the listing must be the pinned one, before and after."""
        entries = self._pinned(origin, into)
        check_size(sum(entry.num_bytes for entry in entries.values()), max_bytes, shown_url(origin.url))
        _keep_own_parts(into, origin)
        filesystem, _ = open_store(origin.url)
        for name, entry in sorted(entries.items()):
            _check(stop, origin.url)
            target = into / name
            if not (target.is_file() and target.stat().st_size == entry.num_bytes):
                download(filesystem, entry.path, entry.num_bytes, target, origin.url, stop)
        self._pinned(origin, into)  # a file that changed while it was read is a mixture
        (into / _REVISION_FILE).unlink()

    def _pinned(self, origin: Origin, into: Path) -> dict[str, Entry]:
        """What the store lists; raises AdapterRejected, and drops what is in `into`, where that is not what it was."""
        entries = list_adapter(origin.url)
        if revision_of(entries) == origin.revision:
            return entries
        _clear(into)
        message = "has other files than when it was registered; register it as a new version"
        raise AdapterRejected("SOURCE_CHANGED", shown_url(origin.url), message)


def _keep_own_parts(into: Path, origin: Origin) -> None:
    """Drop what another revision left; then say whose parts are here."""
    assert origin.revision is not None, "a store's origin is pinned"
    note = into / _REVISION_FILE
    if not note.is_file() or note.read_text() != origin.revision:
        _clear(into)
        note.write_text(origin.revision)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check(stop: threading.Event, url: str) -> None:
    if stop.is_set():
        raise LoadCancelled(shown_url(url))
