"""What every source of adapters does: resolve a URL to pinned content, and fetch that content."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter's files come from, pinned: the same origin is always the same bytes, or a refusal."""

    url: str  # a path for a local folder, else `scheme://...`
    revision: str | None = None  # a commit of the hub, or a SHA-256 over (name, size, etag) of a store; None: local

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def path(self) -> Path | None:
        """The folder itself, of a local origin."""
        return Path(self.url) if self.is_local else None

    def __str__(self) -> str:
        return self.url if self.revision is None else f"{self.url}@{self.revision[:12]}"


class Source(Protocol):
    """One kind of URL. Both calls block, and are made in loader threads; both may be given up by setting `stop`.

    Raises SourceUnavailable where trying again may help (no network, a store that is down), AdapterRejected where it
    does not (nothing there, no permission, content other than what was pinned, more than `max_bytes`), and
    LoadCancelled once `stop` is set.
    """

    def resolve(self, url: str, stop: threading.Event) -> Origin:
        """Pin what `url` is now."""
        ...

    def fetch(self, origin: Origin, into: Path, max_bytes: int, stop: threading.Event) -> None:
        """Write the files into the folder `into`, which may hold a part of them from an earlier attempt.

        When it returns, every file is complete and is the one that was pinned.
        """
        ...
