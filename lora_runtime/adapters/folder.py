"""An adapter's folder on disk: which files count, and that they stay inside it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.digests import content_digest
from lora_runtime.adapters.header import TensorRef, read_header
from lora_runtime.adapters.metadata import MAX_JSON_BYTES, METADATA_FILE, parse_json, parse_json_object
from lora_runtime.errors import AdapterRejected

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
SHARDS = "adapter_model-*.safetensors"
PICKLE_FILES = "adapter_model*.bin"
BASE_CONFIG_FILE = "config.json"  # some trainers leave the task model's config beside the adapter
MAX_SHARDS = 1000


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder, and its bytes as they were read: the digest is of the very bytes that were parsed."""

    root: Path
    home: Path  # where the adapter's own files are: the root, or its one sub-folder of a named adapter
    weights: tuple[str, ...]  # names of safetensors files in `home`
    weight_map: dict[str, str] | None  # tensor → file, of a sharded adapter
    _counted: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])  # name → (bytes, SHA-256)

    def find(self, name: str) -> Path | None:
        """A file beside the adapter or in the root; raises AdapterRejected when it is none or lies elsewhere."""
        for folder in dict.fromkeys((self.home, self.root)):
            path = folder / name
            if _is_there(path):
                _check_file(path, folder, self.root)
                return path
        return None

    def peek(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """The bytes of a file that may turn out not to matter; None without it."""
        path = self.find(name)
        if path is None:
            return None
        if path.stat().st_size > max_bytes:
            raise AdapterRejected("JSON_TOO_LARGE", name, f"is larger than {max_bytes >> 20} MiB")
        return path.read_bytes()

    def count(self, name: str, data: bytes | bytearray) -> str:
        """Make a file part of the adapter's identity; its SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._counted[name] = len(data), sha256
        return sha256

    def read_object(self, name: str) -> dict[str, Any] | None:
        """A JSON object that counts; None without the file."""
        data = self.peek(name)
        if data is None:
            return None
        self.count(name, data)
        return parse_json_object(data, name)

    def read_json(self, name: str) -> Any:
        """Any JSON value of a file that counts; None without the file."""
        data = self.peek(name)
        if data is None:
            return None
        self.count(name, data)
        return parse_json(data, name)

    def read_weights(self, name: str) -> bytearray:
        """The bytes of a weights file, for arrays that share them."""
        path = self.home / name
        data = bytearray(path.stat().st_size)
        with path.open("rb") as stream:
            complete = stream.readinto(data) == len(data) and not stream.read(1)
        if not complete:
            raise AdapterRejected("WEIGHTS_CORRUPT", name, "changed while it was read; load it again")
        self.count(name, data)
        return data

    def sha256(self, name: str) -> str | None:
        """Of a file that was read, or of another in the folder; None without it."""
        if name in self._counted:
            return self._counted[name][1]
        inside = name and Path(name).parts[-1] == name  # a bare name: no way out of the folder
        path = self.find(name) if inside else None
        if path is None:
            return None
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def digest(self) -> str:
        """The identity of what was read so far."""
        return content_digest(self._counted)


def open_folder(folder: Path) -> AdapterFolder:
    """Raises AdapterRejected unless the folder has safetensors weights, and the files it needs lie inside it."""
    if not folder.is_dir():
        fault = "is a file, not a folder" if folder.exists() else "is not a folder: there is none of that name"
        raise AdapterRejected("FOLDER_MISSING", folder.name or str(folder), fault)
    home = _home(folder)
    opened = AdapterFolder(folder, home, (), None)
    for name in (CONFIG_FILE, METADATA_FILE, BASE_CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE):
        opened.find(name)
    if (home / WEIGHTS_FILE).is_file():
        return AdapterFolder(folder, home, (WEIGHTS_FILE,), None)
    if (home / INDEX_FILE).is_file():
        return _open_shards(opened)
    if pickle := next(home.glob(PICKLE_FILES), None):
        message = f"is a pickle, which can run code and is never read; save {WEIGHTS_FILE} instead"
        raise AdapterRejected("PICKLE", pickle.name, message)
    raise AdapterRejected("WEIGHTS_MISSING", WEIGHTS_FILE, "is not in the folder; save the adapter with PEFT")


def _home(folder: Path) -> Path:
    """PEFT saves a named adapter in a sub-folder of that name."""
    if _is_there(folder / CONFIG_FILE):
        return folder
    named = sorted(child for child in folder.iterdir() if not child.name.startswith(".") and child.is_dir())
    named = [child for child in named if (child / CONFIG_FILE).is_file()]
    if len(named) > 1:
        names = ", ".join(child.name for child in named[:10])
        message = f"holds {len(named)} adapters in sub-folders ({names}); register the sub-folder of one"
        raise AdapterRejected("SEVERAL_ADAPTERS", folder.name, message)
    if not named:
        return folder
    _check_inside(named[0], folder, named[0].name)
    return named[0]


def _open_shards(opened: AdapterFolder) -> AdapterFolder:
    index = opened.read_object(INDEX_FILE)
    weight_map = index.get("weight_map") if index else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise AdapterRejected("INDEX_INVALID", INDEX_FILE, "has no weight_map of tensors to files")
    names = sorted(set(weight_map.values()))
    if not names or len(names) > MAX_SHARDS:
        raise AdapterRejected("INDEX_INVALID", INDEX_FILE, f"names {len(names)} files, 1 to {MAX_SHARDS} can be read")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise AdapterRejected("INDEX_INVALID", INDEX_FILE, f"{name!r} is not the name of a safetensors file")
        path = opened.home / name
        if not _is_there(path):
            raise AdapterRejected("WEIGHTS_MISSING", name, f"is not in the folder; {INDEX_FILE} names it")
        _check_file(path, opened.home, opened.root)
    unlisted = sorted(path.name for path in opened.home.glob(SHARDS) if path.name not in names)
    if unlisted:
        raise AdapterRejected("INDEX_INVALID", INDEX_FILE, f"does not name {unlisted[0]}; save the adapter again")
    return replace(opened, weights=tuple(names), weight_map=weight_map)


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _check_file(path: Path, folder: Path, root: Path) -> None:
    """Raise AdapterRejected unless `path`, below `folder`, is a regular file inside `root`."""
    if path.parent != folder or path.is_symlink():
        _check_inside(path, root, path.name)
    if not path.is_file():  # a pipe would be read for ever
        raise AdapterRejected("NOT_A_FILE", path.name, "is not a regular file")


def _check_inside(path: Path, root: Path, name: str) -> None:
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except RuntimeError:  # a loop of links
        inside = False
    if not inside:
        raise AdapterRejected("LINK_OUT_OF_FOLDER", name, "is a link that leaves the folder; copy the file instead")


def read_headers(folder: AdapterFolder) -> dict[str, TensorRef]:
    """All tensors by key; raises AdapterRejected unless they are where the index says, each once."""
    tensors: dict[str, TensorRef] = {}
    for name in folder.weights:
        for key, ref in read_header(folder.home / name).items():
            if key in tensors:
                ref.refuse("DUPLICATE_TENSOR", f"is in {tensors[key].file} too")
            if folder.weight_map is not None and folder.weight_map.get(key) != name:
                ref.refuse("INDEX_INVALID", f"is not where {INDEX_FILE} says: {folder.weight_map.get(key)}")
            tensors[key] = ref
    if lacking := sorted((folder.weight_map or {}).keys() - tensors.keys()):
        where = f"{(folder.weight_map or {})[lacking[0]]} tensor {lacking[0]}"
        raise AdapterRejected("MISSING_TENSOR", where, f"is missing; {INDEX_FILE} names it")
    return tensors
