"""Fetched adapters on disk: whole folders under a budget of bytes, the least recently used evicted first.

    <root>/<key>        complete: made by one rename, after its files were synced
    <root>/<key>.part   a fetch under way, or what is left of one and can be resumed
    <root>/<key>.N.gone being deleted

What is complete is found again after a restart. A root belongs to one process: another would evict what this one
has leased. The budget holds for all that is neither leased nor being fetched.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.adapters.sources.disk import delete, measure, sync, sync_tree

_KEY = re.compile(r"[0-9a-f]{64}")
_OURS = re.compile(r"[0-9a-f]{64}(\.part|\.[0-9]+\.gone)?")
_PART, _GONE = ".part", ".gone"


@dataclass(slots=True)
class _Folder:
    num_bytes: int
    leases: int = 0


class DiskCache:
    """Folders by key (a SHA-256 in hex). Thread-safe."""

    def __init__(self, root: Path, num_bytes: int) -> None:
        """Find what `root` holds. Raises OSError when it cannot be made or read."""
        self.root = root
        self.num_bytes = num_bytes
        self._lock = threading.Lock()
        self._folders: OrderedDict[str, _Folder] = OrderedDict()  # complete, least recently used first
        self._parts: OrderedDict[str, int] = OrderedDict()  # bytes of fetches that were given up, oldest first
        self._fetching: set[str] = set()
        self._deletions = itertools.count(os.getpid() * 1_000_000)  # a name that no earlier run left behind
        root.mkdir(parents=True, exist_ok=True)
        self._recover()

    def acquire(self, key: str) -> Path | None:
        """The complete folder of `key`, not evicted until it is released; None without it."""
        with self._lock:
            folder = self._folders.get(key)
            if folder is None:
                return None
            path = self.root / key
            if not path.is_dir():  # somebody emptied the cache by hand
                if not folder.leases:
                    del self._folders[key]
                return None
            with suppress(OSError):  # only the order of evictions hangs on it
                os.utime(path)  # that order outlives a restart
            folder.leases += 1
            self._folders.move_to_end(key)
            return path

    def release(self, key: str) -> None:
        """Give back what `acquire` or `publish` gave."""
        with self._lock:
            folder = self._folders[key]
            assert folder.leases > 0, f"{key} is released more often than acquired"
            folder.leases -= 1
            gone = self._evict()
        delete(gone)

    def begin(self, key: str) -> Path:
        """The folder to fetch into; it may hold a part from before. One fetch of a key at a time."""
        path = self._part(key)
        with self._lock:
            assert key not in self._fetching, f"{key} is being fetched"
            path.mkdir(parents=True, exist_ok=True)
            self._fetching.add(key)
            self._parts.pop(key, None)
        return path

    def publish(self, key: str) -> Path:
        """Make what was fetched visible, at once and for good, and acquire it."""
        part, path = self._part(key), self.root / key
        sync_tree(part)
        num_bytes = measure(part)
        with self._lock:
            if key not in self._folders:
                delete([path])  # not of this run's making
            part.rename(path)
            self._fetching.discard(key)
            before = self._folders.pop(key, None)  # its files were deleted by hand while somebody held it
            self._folders[key] = _Folder(num_bytes, 1 + (before.leases if before else 0))
            gone = self._evict()
        with suppress(OSError):  # at worst it is fetched again after a crash
            sync(self.root)
        delete(gone)
        return path

    def abandon(self, key: str) -> None:
        """End a fetch that failed; its part is kept for the next one while the budget has room."""
        num_bytes = measure(self._part(key))
        with self._lock:
            self._fetching.discard(key)
            if self._part(key).is_dir():
                self._parts[key] = num_bytes
            gone = self._evict()
        delete(gone)

    def remove(self, key: str) -> int:
        """Delete what `key` has, complete or not; the bytes freed, 0 while it is leased or fetched."""
        with self._lock:
            folder = self._folders.get(key)
            if key in self._fetching or (folder is not None and folder.leases):
                return 0
            freed = self._parts.get(key, 0) + (folder.num_bytes if folder else 0)
            gone = [self._drop(key)] if folder else []
            gone += [self._drop_part(key)] if key in self._parts else []
        delete(gone)
        return freed

    def bytes_of(self, key: str) -> int:
        """Of the complete folder; 0 without it."""
        with self._lock:
            folder = self._folders.get(key)
            return folder.num_bytes if folder else 0

    @property
    def used_bytes(self) -> int:
        """Of complete folders and of parts that no fetch is using."""
        with self._lock:
            return self._used()

    def check_integrity(self) -> None:
        """Assert that the books agree with the disk and that the budget holds."""
        with self._lock:
            for key, folder in self._folders.items():
                assert folder.leases >= 0 and folder.num_bytes == measure(self.root / key), key
            for key, num_bytes in self._parts.items():
                assert key not in self._fetching and num_bytes == measure(self._part(key)), key
            held = any(folder.leases for folder in self._folders.values())
            assert held or self._used() <= self.num_bytes, "over the budget with nothing leased"
            on_disk = {path.name for path in self.root.iterdir() if _KEY.fullmatch(path.name)}
            assert on_disk == set(self._folders), "a complete folder is not in the books"

    def _recover(self) -> None:
        ours = [path for path in self.root.iterdir() if _OURS.fullmatch(path.name)]  # nothing else is touched
        found = [(path.stat().st_mtime, path.name) for path in ours if path.is_dir()]
        gone = [self.root / name for _, name in found if name.endswith(_GONE)]
        for _, name in sorted(found):
            if _KEY.fullmatch(name):
                self._folders[name] = _Folder(measure(self.root / name))
            elif name.endswith(_PART):
                self._parts[name.removesuffix(_PART)] = measure(self.root / name)
        delete(gone + self._evict())

    def _evict(self) -> list[Path]:
        """Take out parts, then folders that nobody holds, until the budget holds; what is to be deleted."""
        gone: list[Path] = []
        over = self._used() - self.num_bytes
        for key, num_bytes in list(self._parts.items()):
            if over > 0:
                gone.append(self._drop_part(key))
                over -= num_bytes
        for key, folder in list(self._folders.items()):
            if over > 0 and not folder.leases:
                gone.append(self._drop(key))
                over -= folder.num_bytes
        return gone

    def _used(self) -> int:
        return sum(folder.num_bytes for folder in self._folders.values()) + sum(self._parts.values())

    def _part(self, key: str) -> Path:
        return self.root / f"{key}{_PART}"

    def _drop(self, key: str) -> Path:
        del self._folders[key]
        return self._set_aside(self.root / key, key)

    def _drop_part(self, key: str) -> Path:
        del self._parts[key]
        return self._set_aside(self._part(key), key)

    def _set_aside(self, path: Path, key: str) -> Path:
        """Rename it first: a crash in the middle of a deletion leaves nothing that looks complete."""
        gone = self.root / f"{key}.{next(self._deletions)}{_GONE}"
        try:
            path.rename(gone)
        except OSError:  # deleted by hand, or a folder that cannot be written
            return path
        return gone
