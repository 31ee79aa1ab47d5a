"""Folders as a scan sees them: those of a disk, opened one by one, and those of a store, from one listing."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from lora_runtime.adapters.sources.urls import LOCAL, scheme_of

Identity = tuple[int, int]  # device and inode


class LinkLoop(Exception):
    """A link leads to a folder that it lies in."""


class Folder(Protocol):
    """One folder. Hidden ones (with a leading dot) and hidden files do not show."""

    @property
    def url(self) -> str: ...

    @property
    def files(self) -> Collection[str]: ...

    @property
    def names(self) -> Collection[str]:
        """Of its sub-folders; on a disk also of links that may lead to one."""
        ...

    def open(self, name: str) -> Folder:
        """A sub-folder. Raises OSError, and LinkLoop."""
        ...

    def signature(self) -> str:
        """Over (name, size, time of change or etag) of its files. Raises OSError."""
        ...


def open_root(root: str) -> Folder:
    """The folder or URL `root`; raises OSError, or as a source does."""
    if scheme_of(root) in (LOCAL, "file", "local"):
        path = root if scheme_of(root) == LOCAL else root.partition("://")[2]
        return DiskFolder(path.rstrip("/") or path[:1], None)
    from lora_runtime.adapters.sources.listing import list_tree  # fsspec only where a URL asks for it

    return _tree(root.rstrip("/"), {name: entry.stamp for name, entry in list_tree(root).items()})


class DiskFolder:
    """A folder of the file system, listed once. Links to folders are followed: the root is its operator's."""

    def __init__(self, path: str, parent: DiskFolder | None) -> None:
        self.url = path
        self.files: dict[str, os.DirEntry[str]] = {}
        self.names: dict[str, bool] = {}  # whether it is a link
        self._parent = parent
        self._identity: Identity | None = None
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    self.names[entry.name] = False
                elif entry.is_symlink() and _leads_to_folder(entry):
                    self.names[entry.name] = True
                else:
                    self.files[entry.name] = entry

    def open(self, name: str) -> DiskFolder:
        """Raises OSError, and LinkLoop where it is a link to this folder or one above."""
        path = f"{self.url}/{name}"
        if self.names[name]:
            self._check_loop(path)
        return DiskFolder(path, self)

    def signature(self) -> str:
        """One stat a file."""
        stats = [(name, self.files[name].stat()) for name in sorted(self.files)]
        return ";".join(f"{name},{stat.st_size},{stat.st_mtime_ns}" for name, stat in stats)

    def _check_loop(self, path: str) -> None:
        target = _identity(path)
        above: DiskFolder | None = self
        while above is not None:
            if above._identity is None:
                above._identity = _identity(above.url)
            if above._identity == target:
                raise LinkLoop(path)
            above = above._parent


@dataclass(slots=True)
class StoreFolder:
    """A folder of a store, from the names of the objects below it."""

    url: str
    files: dict[str, str] = field(default_factory=dict[str, str])  # name → size and etag
    folders: dict[str, StoreFolder] = field(default_factory=dict[str, "StoreFolder"])

    @property
    def names(self) -> Collection[str]:
        return self.folders.keys()

    def open(self, name: str) -> StoreFolder:
        return self.folders[name]

    def signature(self) -> str:
        return ";".join(f"{name},{self.files[name]}" for name in sorted(self.files))


def _tree(url: str, files: dict[str, str]) -> StoreFolder:
    """`files`: path below `url` → size and etag."""
    root = StoreFolder(url)
    for path, stamp in files.items():
        *above, name = path.split("/")
        if any(part.startswith(".") or not part for part in (*above, name)):
            continue  # hidden, or no name that a folder could have
        folder = root
        for part in above:
            folder = folder.folders.setdefault(part, StoreFolder(f"{folder.url}/{part}"))
        folder.files[name] = stamp
    return root


def _identity(path: str) -> Identity:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """True too where that cannot be told: opening it gives the reason."""
    try:
        return entry.is_dir() or not entry.is_file()
    except OSError:
        return True
