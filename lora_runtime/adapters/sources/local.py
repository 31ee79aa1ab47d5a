"""Adapters in local folders: used where they lie."""

from __future__ import annotations

import threading
from pathlib import Path

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.adapters.sources.urls import LOCAL, scheme_of
from lora_runtime.errors import AdapterRejected


class LocalSource:
    """A path, or `file://` and a path."""

    def resolve(self, url: str, stop: threading.Event) -> Origin:
        """The folder itself; raises AdapterRejected when it is none."""
        del stop  # nothing here takes long
        path = Path(url if scheme_of(url) == LOCAL else url.partition("://")[2])
        if not path.is_dir():
            fault = "is a file, not a folder" if path.exists() else "is not a folder: there is none of that name"
            raise AdapterRejected("FOLDER_MISSING", str(path), fault)
        return Origin(url=str(path), revision=None)

    def fetch(self, origin: Origin, into: Path, max_bytes: int, stop: threading.Event) -> None:
        """Never called: the fetcher opens a local folder without a copy."""
        del into, max_bytes, stop
        raise AssertionError(f"{origin} is a local folder: there is nothing to fetch")
