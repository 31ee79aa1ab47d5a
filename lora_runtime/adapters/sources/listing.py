"""What a store says it has: names, sizes and etags, asked anew each time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.folder import INDEX_FILE
from lora_runtime.adapters.metadata import MAX_JSON_BYTES, parse_json_object
from lora_runtime.adapters.pooling import POOLING_FILE
from lora_runtime.adapters.sources.faults import at_store, unsupported
from lora_runtime.adapters.sources.names import KNOWN_FILES, MAX_FILES, check_inside, select_files
from lora_runtime.adapters.sources.urls import scheme_of, shown_url
from lora_runtime.errors import AdapterRejected

HTTP = ("http", "https")
_LISTED_FRESH = ("s3", "s3a", "gs", "gcs", *HTTP)  # these take fsspec's option; the others are told each time
_ETAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "content_md5")
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "modificationTime")
_MAX_SUB_FOLDERS = 50
_MAX_REQUESTS = 8  # at once, to a server that lists nothing


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a store."""

    path: str  # as the store's file system calls it
    num_bytes: int
    etag: str  # or when it was changed; empty where the store tells neither

    @property
    def stamp(self) -> str:
        """Changes when the file does, as far as the store tells."""
        return f"{self.num_bytes},{self.etag}"


def open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and its path there. Raises AdapterRejected where nothing installed reads the scheme."""
    scheme = scheme_of(url)
    _check_url(url, scheme)
    import fsspec.core  # slow to import, and only URLs need it

    options = {"use_listings_cache": False} if scheme in _LISTED_FRESH else {}
    with at_store(url):
        try:
            filesystem, path = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError):  # the package is missing, or nobody knows the scheme
            raise unsupported(url, scheme) from None
    return filesystem, path.rstrip("/")


def list_adapter(url: str) -> dict[str, Entry]:
    """The files of the adapter at `url`, by name below it; its sub-folders count where it has no config itself."""
    filesystem, path = open_store(url)
    where = shown_url(url)
    entries = _ask(filesystem, path, url) if scheme_of(url) in HTTP else _list(filesystem, path, url)
    return {name: entries[name] for name in select_files(entries, where)}


def list_tree(url: str) -> dict[str, Entry]:
    """Every file below `url`, by name below it; empty where there are none."""
    if scheme_of(url) in (*HTTP, "hf"):
        message = "cannot be listed as a root; use a folder or an object store"
        raise AdapterRejected("SOURCE_UNSUPPORTED", shown_url(url), message)
    filesystem, path = open_store(url)
    with at_store(url):
        filesystem.invalidate_cache()
        found: dict[str, Any] = filesystem.find(path, detail=True)
    return {name: _entry(info, url) for info in found.values() if (name := _below(info, path))}


def revision_of(entries: Mapping[str, Entry]) -> str:
    """SHA-256 over the sorted (name, size, etag)."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(f"{name}\0{entries[name].stamp}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _list(filesystem: Any, path: str, url: str) -> dict[str, Entry]:
    with at_store(url):
        filesystem.invalidate_cache()
        infos: list[dict[str, Any]] = filesystem.ls(path, detail=True)
    files = {name: info for info in infos if (name := _below(info, path)) and info["type"] != "directory"}
    folders = [name for info in infos if (name := _below(info, path)) and info["type"] == "directory"]
    for name in folders:
        check_inside(name, shown_url(url))
    if len(files) > MAX_FILES or len(folders) > MAX_FILES:
        message = f"has more than {MAX_FILES} files or folders; it is not an adapter's folder"
        raise AdapterRejected("SOURCE_TOO_LARGE", shown_url(url), message)
    pooling = POOLING_FILE.partition("/")[0]
    for name in [name for name in folders if name == pooling] if CONFIG_FILE in files else folders[:_MAX_SUB_FOLDERS]:
        with at_store(url):
            infos = filesystem.ls(f"{path}/{name}", detail=True)
        files |= {below: info for info in infos if info["type"] != "directory" and (below := _below(info, path))}
    return {name: _entry(info, url) for name, info in files.items()}


def _ask(filesystem: Any, path: str, url: str) -> dict[str, Entry]:
    """A web server lists nothing: it is asked for each name that an adapter can have."""
    entries = _ask_names(filesystem, path, url, KNOWN_FILES)
    if (index := entries.get(INDEX_FILE)) is not None and index.num_bytes <= MAX_JSON_BYTES:
        with at_store(url):
            data: bytes = filesystem.cat_file(index.path)
        weight_map = parse_json_object(data, INDEX_FILE).get("weight_map")
        shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        for name in shards[: MAX_FILES + 1]:
            check_inside(name, shown_url(url))
        entries |= _ask_names(filesystem, path, url, tuple(shards[: MAX_FILES + 1]))
    return entries


def _ask_names(filesystem: Any, path: str, url: str, names: tuple[str, ...]) -> dict[str, Entry]:
    def ask(name: str) -> Entry | None:
        try:
            with at_store(url):
                return _entry(filesystem.info(f"{path}/{name}"), url)
        except AdapterRejected as error:
            # a bucket behind a web server answers 403 for what is not there
            if error.code == "SOURCE_MISSING" or (error.code == "SOURCE_FORBIDDEN" and name != CONFIG_FILE):
                return None
            raise

    with ThreadPoolExecutor(_MAX_REQUESTS) as pool:
        answers = list(pool.map(ask, names))
    return {name: entry for name, entry in zip(names, answers, strict=True) if entry is not None}


def _entry(info: dict[str, Any], url: str) -> Entry:
    size = info.get("size")
    if size is None:
        name = str(info["name"]).rpartition("/")[2]
        raise AdapterRejected("SOURCE_UNSUPPORTED", shown_url(url), f"does not tell the size of {name}")
    etag = next((info[key] for key in (*_ETAGS, *_TIMES, "created") if info.get(key)), "")
    return Entry(str(info["name"]), int(size), str(etag))


def _below(info: dict[str, Any], path: str) -> str:
    """Its name below `path`; empty for the folder itself, which some stores list as a file."""
    name = str(info["name"])
    return name[len(path) + 1 :].rstrip("/") if name.startswith(f"{path}/") and not name.endswith("//") else ""


def _check_url(url: str, scheme: str) -> None:
    authority, _, rest = url.partition("://")[2].partition("/")
    if "::" in url:
        raise AdapterRejected("SOURCE_UNSUPPORTED", shown_url(url), "chains file systems; give a plain URL")
    if ":" in authority.rpartition("@")[0] or (scheme in HTTP and ("@" in authority or "?" in rest)):
        message = "carries credentials or a query; give credentials by the environment"
        raise AdapterRejected("SOURCE_UNSUPPORTED", shown_url(url), message)
