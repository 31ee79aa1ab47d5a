"""Which adapters lie under a root, by the names of folders alone: no file is read.

    <root>/<tenant>/<adapter>/<version>/   the version in plain digits
    <root>/<adapter>/<version>/            the default tenant's
    <root>/<adapter>/                      the default tenant's, version 1

The last folder has adapter_config.json in it, or in its one sub-folder with a name that is no version (PEFT saves a
named adapter in a sub-folder of that name). A folder that has adapter_config.json is not looked into further.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.pooling import POOLING_FILE
from lora_runtime.adapters.sources.trees import Folder, LinkLoop, open_root
from lora_runtime.errors import InvalidRequest
from lora_runtime.types import BASE_NAME, DEFAULT_TENANT, AdapterId, check_name, parse_version

_POOLING = POOLING_FILE.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter's folder. Its signature changes when a file of it does, and is compared only with its own."""

    url: str  # a path, or the URL of a store
    signature: str  # over (name, size, time of change or etag) of its files


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found under a root, what was not taken, and what could be meant otherwise: name below the root, why."""

    found: dict[AdapterId, Found] = field(default_factory=dict[AdapterId, Found])
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    doubtful: dict[str, str] = field(default_factory=dict[str, str])


def scan_root(root: str) -> Scan:
    """Look at a local folder or an fsspec URL.

    Raises OSError when a local root cannot be read, and as a source does (AdapterRejected, SourceUnavailable) when a
    store cannot be listed. Anything wrong below the root is skipped with the reason.
    """
    top = open_root(root)
    walk = _Walk()
    for name in sorted(top.names):
        walk.top(top, name)
    return walk.scan


@dataclass(slots=True)
class _Children:
    """The sub-folders of a folder of the root, by what is in them."""

    named: dict[str, Folder] = field(default_factory=dict[str, Folder])  # adapter_config.json itself
    versioned: dict[str, Folder] = field(default_factory=dict[str, Folder])  # folders with a number for a name
    num_versions: int = 0  # that are versions themselves
    others: list[str] = field(default_factory=list[str])


class _Walk:
    """The layout's rules, over folders of any kind. `label` is a folder's name below the root."""

    def __init__(self) -> None:
        self.scan = Scan()

    def top(self, root: Folder, name: str) -> None:
        """A folder of the root: an adapter, one with versions, or a tenant."""
        folder = self._open(root, name, name)
        if folder is None or not self._is_name(name, name):
            return
        if CONFIG_FILE in folder.files:
            self._add(name, DEFAULT_TENANT, name, 1, (folder,))
            return
        children = self._children(folder, name)
        if children.versioned:
            self._tenant(name, children)
        elif len(children.named) == 1:
            self._add(name, DEFAULT_TENANT, name, 1, (folder, *children.named.values()))
            if name not in self.scan.skipped:
                self.scan.doubtful[name] = _doubt(name, *children.named)
        elif children.named:
            self.scan.skipped[name] = _several(children.named)
        elif not children.num_versions:
            self.scan.skipped[name] = (
                f"has no {CONFIG_FILE} in it, nor in a folder of it, nor in adapter/version/ below"
            )

    def _children(self, folder: Folder, label: str) -> _Children:
        """Sort out the sub-folders of one that has no adapter_config.json; versions of the default tenant are taken."""
        children = _Children()
        for name in sorted(folder.names):
            child = self._open(folder, name, f"{label}/{name}")
            if child is None:
                continue
            if CONFIG_FILE not in child.files and any(map(_is_digits, child.names)):
                children.versioned[name] = child
            elif _is_digits(name):
                children.num_versions += 1
                self._version(child, f"{label}/{name}", DEFAULT_TENANT, label, name)
            elif CONFIG_FILE in child.files:
                children.named[name] = child
            else:
                children.others.append(name)
        return children

    def _tenant(self, tenant: str, children: _Children) -> None:
        for name in (*children.named, *children.others):
            self.scan.skipped[f"{tenant}/{name}"] = "has no version folder; move its files into one called 1"
        for name, folder in children.versioned.items():
            if not self._is_name(f"{tenant}/{name}", name):
                continue
            for version in filter(_is_digits, sorted(folder.names)):
                label = f"{tenant}/{name}/{version}"
                if (child := self._open(folder, version, label)) is not None:
                    self._version(child, label, tenant, name, version)

    def _version(self, folder: Folder, label: str, tenant: str, name: str, version: str) -> None:
        """A folder whose name is all digits."""
        try:
            number = parse_version(version)
        except InvalidRequest as error:
            self.scan.skipped[label] = error.description
            return
        if CONFIG_FILE in folder.files:
            self._add(label, tenant, name, number, (folder,))
            return
        opened = {sub: self._open(folder, sub, f"{label}/{sub}") for sub in sorted(folder.names) if not _is_digits(sub)}
        homes = {sub: home for sub, home in opened.items() if home is not None and CONFIG_FILE in home.files}
        if len(homes) == 1:
            self._add(label, tenant, name, number, (folder, *homes.values()))
        elif homes:
            self.scan.skipped[label] = _several(homes)
        else:
            self.scan.skipped[label] = f"has no {CONFIG_FILE}"

    def _add(self, label: str, tenant: str, name: str, version: int, folders: tuple[Folder, ...]) -> None:
        if name == BASE_NAME:
            self.scan.skipped[label] = f"the name {BASE_NAME!r} is reserved for the base model; rename the folder"
            return
        adapter = AdapterId(tenant, name, version)
        if (other := self.scan.found.get(adapter)) is not None:
            self.scan.skipped[label] = f"is {adapter}, as {other.url} is; take one of them away"
            return
        try:
            # a sentence encoder's pooling is a file in a folder of its own
            pooling = [folder.open(_POOLING) for folder in folders if _POOLING in folder.names]
            signature = "\n".join(folder.signature() for folder in (*folders, *pooling))
        except (OSError, LinkLoop) as error:
            self.scan.skipped[label] = _reason(error)
            return
        self.scan.found[adapter] = Found(folders[0].url, signature)

    def _open(self, parent: Folder, name: str, label: str) -> Folder | None:
        try:
            return parent.open(name)
        except NotADirectoryError:
            pass  # it has just been replaced by a file
        except (OSError, LinkLoop) as error:
            self.scan.skipped[label] = _reason(error)
        return None

    def _is_name(self, label: str, name: str) -> bool:
        try:
            check_name("folder", name)
        except InvalidRequest as error:
            self.scan.skipped[label] = error.description
            return False
        return True


def _is_digits(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _doubt(name: str, sub: str) -> str:
    return (
        f"{name}/{sub} is read as {AdapterId(DEFAULT_TENANT, name, 1)}, which PEFT saved in a sub-folder of its name; "
        f"is it adapter {sub} of tenant {name}, move its files to {name}/{sub}/1/; is it not, to {name}/1/"
    )


def _several(homes: Collection[str]) -> str:
    names = ", ".join(sorted(homes)[:10])
    return (
        f"holds {len(homes)} adapters in sub-folders ({names}); move the files of each into a folder 1 in it, as "
        "TENANT/ADAPTER/1, or into a folder of the root"
    )


def _reason(error: OSError | LinkLoop) -> str:
    if isinstance(error, LinkLoop):
        return "is a link to a folder that it lies in"
    return f"cannot be read: {error.strerror or type(error).__name__}"
