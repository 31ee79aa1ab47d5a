"""Adapters by URL: resolved to an origin, fetched once for all who ask, and leased from the disk cache."""

from __future__ import annotations

import errno
import hashlib
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from lora_runtime.adapters.sources.api import Origin, Source
from lora_runtime.adapters.sources.cache import DiskCache
from lora_runtime.adapters.sources.urls import LOCAL, scheme_of, shown_url
from lora_runtime.errors import AdapterRejected, LoadCancelled, SourceUnavailable

ANY = "*"  # the source of every scheme that has none of its own
NUM_RETRIES = 3
_POLL_S = 0.05  # how soon a caller that waits for another's fetch sees its own `stop`

T = TypeVar("T")


class Lease:
    """A folder that stays as it is until it is released."""

    def __init__(self, path: Path, num_bytes: int, release: Callable[[], None] | None = None) -> None:
        self.path = path
        self.num_bytes = num_bytes  # of the disk cache; 0: a local folder, used where it lies
        self._release = release
        self._lock = threading.Lock()

    def release(self) -> None:
        """Give the folder back. Only the first call counts."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Flight:
    """One fetch under way, and how it ended for those who waited for it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None  # None too where it was given up: a waiting caller carries on

    def wait(self, origin: Origin, stop: threading.Event) -> None:
        """Until it ends; raises its error, or LoadCancelled once `stop` is set."""
        while not self.done.wait(_POLL_S):
            _check(stop, origin.url)
        if self.error is not None:
            raise self.error


class Fetcher:
    """Sources by scheme (LOCAL, ANY and others) before one disk cache. Thread-safe; its calls block."""

    def __init__(
        self, sources: Mapping[str, Source], cache: DiskCache, max_adapter_bytes: int, *, backoff_s: float = 0.5
    ) -> None:
        self.cache = cache
        self._sources = dict(sources)
        self._max_bytes = min(max_adapter_bytes, cache.num_bytes)
        self._backoff_s = backoff_s  # before the first retry, then doubled
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    def resolve(self, url: str, stop: threading.Event) -> Origin:
        """Pin what `url` is now. Raises as Source does, after the retries."""
        source = self._source(url)
        return self._retried(url, stop, lambda: source.resolve(url, stop))

    def open(self, origin: Origin, stop: threading.Event) -> Lease:
        """A folder with the very files of `origin`: its own, that of the cache, or fetched now."""
        if (local := origin.path) is not None:
            return Lease(local, 0)
        key = cache_key(origin)
        while (lease := self._cached(key)) is None:
            _check(stop, origin.url)
            with self._lock:
                flight = self._flights.get(key)
                if leads := flight is None:
                    flight = self._flights[key] = _Flight()
            if leads:
                return self._lead(origin, key, flight, stop)
            flight.wait(origin, stop)
        return lease

    def cached_bytes(self, origin: Origin) -> int:
        """Bytes of the disk cache that it has; 0 where it is not fetched, and for a local folder."""
        return 0 if origin.is_local else self.cache.bytes_of(cache_key(origin))

    def evict(self, origin: Origin) -> int:
        """Delete its files from the cache; the bytes freed, 0 while somebody holds or fetches them."""
        return 0 if origin.is_local else self.cache.remove(cache_key(origin))

    def _lead(self, origin: Origin, key: str, flight: _Flight, stop: threading.Event) -> Lease:
        try:
            # another flight may have landed between the look into the cache and the start of this one
            return self._cached(key) or self._retried(origin.url, stop, lambda: self._fetch(origin, key, stop))
        except LoadCancelled:
            raise
        except Exception as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[key]
            flight.done.set()

    def _fetch(self, origin: Origin, key: str, stop: threading.Event) -> Lease:
        source = self._source(origin.url)
        published = False
        try:
            into = self.cache.begin(key)
            source.fetch(origin, into, self._max_bytes, stop)
            path = self.cache.publish(key)
            published = True
        except OSError as error:  # a source's own are already of the tree: this is our disk
            raise _disk_error(origin, error) from error
        finally:
            if not published:
                self.cache.abandon(key)
        return self._lease(key, path)

    def _cached(self, key: str) -> Lease | None:
        path = self.cache.acquire(key)
        return None if path is None else self._lease(key, path)

    def _lease(self, key: str, path: Path) -> Lease:
        return Lease(path, self.cache.bytes_of(key), lambda: self.cache.release(key))

    def _retried(self, url: str, stop: threading.Event, call: Callable[[], T]) -> T:
        wait_s = self._backoff_s
        for _ in range(NUM_RETRIES):
            _check(stop, url)
            try:
                return call()
            except SourceUnavailable:
                stop.wait(wait_s * random.uniform(0.5, 1.5))  # spread: many replicas see a store come back at once
            wait_s *= 2
        _check(stop, url)
        return call()

    def _source(self, url: str) -> Source:
        scheme = scheme_of(url)
        source = self._sources.get(scheme) or self._sources.get(ANY)
        if source is None:
            known = ", ".join(sorted(name for name in self._sources if name != LOCAL)) or "none"
            raise AdapterRejected("SOURCE_UNSUPPORTED", shown_url(url), f"no source of this scheme; known: {known}")
        return source


def cache_key(origin: Origin) -> str:
    """The name of its folder in the cache."""
    return hashlib.sha256(f"{origin.url}\0{origin.revision}".encode(errors="surrogatepass")).hexdigest()


def default_fetcher(cache_root: Path, cache_bytes: int, max_adapter_bytes: int) -> Fetcher:
    """Local folders, the Hugging Face hub (`hf://`), and whatever fsspec reaches. Raises OSError for `cache_root`."""
    from lora_runtime.adapters.sources.hub import HubSource
    from lora_runtime.adapters.sources.local import LocalSource
    from lora_runtime.adapters.sources.store import StoreSource

    local = LocalSource()
    sources: dict[str, Source] = {LOCAL: local, "file": local, "local": local, "hf": HubSource(), ANY: StoreSource()}
    return Fetcher(sources, DiskCache(cache_root, cache_bytes), max_adapter_bytes)


def _check(stop: threading.Event, url: str) -> None:
    if stop.is_set():
        raise LoadCancelled(shown_url(url))


def _disk_error(origin: Origin, error: OSError) -> SourceUnavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fault = "the disk of the adapter cache is full; free space on it, or lower --cache-mib to what it can hold"
    else:
        fault = f"the adapter cache cannot be written ({error.strerror or type(error).__name__}); check its folder"
    return SourceUnavailable(shown_url(origin.url), fault)
