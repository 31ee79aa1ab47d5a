"""From settings to a backend that may serve: load the base, list what is known, preload. All blocks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.adapters.sources.fetch import Fetcher
from lora_runtime.adapters.sources.scan import Found, Scan, scan_root
from lora_runtime.errors import InvalidRequest, MultiloraError
from lora_runtime.observers import EngineObserver
from lora_runtime.types import DEFAULT_ALIAS, AdapterId, AdapterRef
from server.backend import Backend, Engine
from server.control.places import Places
from server.control.state import Changes, StateStore
from server.control.surviving import surviving
from server.settings import MIB, ServeSettings

_EXAMINE_WAIT_S = 3.0  # so that folders that are refused are known when the server says it is up

_MAX_RESOLVES = 16

_log = logging.getLogger(__name__)


class StartupError(Exception):
    """The server cannot start; the message says what to change."""


BackendFactory = Callable[[ServeSettings, Fetcher], Backend]


def load_runtime(settings: ServeSettings, fetcher: Fetcher) -> Backend:
    """The real backend, imported only now: torch takes seconds, in which health is already answered."""
    from lora_runtime.runtime import Runtime, RuntimeSettings

    return Runtime(
        settings.base,
        RuntimeSettings(
            arena_bytes=settings.arena_mib * MIB,
            token_budget=settings.token_budget,
            beside_tokens=settings.beside_tokens,
            max_batch_sequences=settings.max_batch_sequences,
            num_loader_threads=settings.loader_threads,
            num_threads=settings.threads,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.lora_backend,
            graph_bytes=settings.graph_mib * MIB,
            host_bytes=settings.host_mib * MIB,
            kv_bytes=settings.kv_mib * MIB,
            prefix_cache=settings.prefix_cache,
            prepack=settings.prepack,
            quantize=settings.quantize,
            gguf_file=settings.gguf_file,
        ),
        fetcher,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A backend that may serve, and what was found under the root."""

    backend: Backend
    scan: Scan


def prepare_backend(
    settings: ServeSettings,
    factory: BackendFactory,
    fetcher: Fetcher,
    observers: Sequence[EngineObserver],
    store: StateStore,
    places: Places,
) -> Prepared:
    """A backend with everything listed that is under the root or was kept, the preloads resident, kernels warm."""
    scan = _scan(settings.adapters)
    try:
        backend = factory(settings, fetcher)
    except (MultiloraError, OSError, ValueError) as error:
        raise StartupError(f"--base: {_first_line(error)}") from error
    try:
        for observer in observers:
            backend.engine.add_observer(observer)
        scan = _register(backend.engine, scan, store, places, fetcher)
        _restore(backend.engine, store)
        _wait_for_examination(backend.engine)
        preload(backend.engine, settings.preload)
        backend.warm_up()
    except BaseException:
        backend.close(0.0)
        raise
    return Prepared(backend, scan)


def _scan(root: str) -> Scan:
    try:
        scan = scan_root(root)
    except OSError as error:
        raise StartupError(f"--adapters: {root} cannot be read: {error.strerror or error}") from error
    except MultiloraError as error:
        raise StartupError(f"--adapters: {error.message}") from error
    for name, reason in scan.skipped.items():
        _log.warning("folder %s is skipped: %s", name, reason)
    for name, doubt in scan.doubtful.items():
        _log.warning("folder %s is ambiguous: %s", name, doubt)
    return scan


def _register(engine: Engine, scan: Scan, store: StateStore, places: Places, fetcher: Fetcher) -> Scan:
    """List the folders of the root and what clients registered, lowest version first.

    A folder that came to the root later does not replace what a client registered: a version is immutable. Returns the
    scan without what could not be reached, which is tried again when it is looked at next.
    """
    origins = _pinned(scan, fetcher)
    scan = replace(scan, found={adapter: found for adapter, found in scan.found.items() if adapter in origins})
    for kept in store.registrations():
        try:
            origins[kept.id] = places.origin(kept)
        except InvalidRequest as error:
            _log.warning("adapter %s is not listed: %s", kept.id, error.description)
    listed = [(adapter, engine.register(adapter, origin, examine=False)) for adapter, origin in sorted(origins.items())]
    for adapter, future in listed:
        try:
            future.result()
        except MultiloraError as error:
            _log.warning("adapter %s is not listed: %s", adapter, error.message)
    return scan


def _pinned(scan: Scan, fetcher: Fetcher) -> dict[AdapterId, Origin]:
    """Where the files of what was found are; those of a store are pinned to what they are now."""
    never = threading.Event()

    def pin(adapter: AdapterId, found: Found) -> Origin | None:
        try:
            return fetcher.resolve(found.url, never)
        except MultiloraError as error:
            _log.warning("adapter %s is not listed: %s", adapter, error.message)
            return None

    local = {adapter: Origin(found.url) for adapter, found in scan.found.items() if "://" not in found.url}
    remote = {adapter: found for adapter, found in scan.found.items() if adapter not in local}
    with ThreadPoolExecutor(_MAX_RESOLVES, "resolve-url") as pool:
        origins = zip(remote, pool.map(pin, remote.keys(), remote.values()), strict=True)
        return local | {adapter: origin for adapter, origin in origins if origin is not None}


def _restore(engine: Engine, store: StateStore) -> None:
    """Aliases as they were, then pins; and where a bare name leads is kept from now on."""
    kept = store.aliases()
    for alias in kept:
        usable = surviving(alias, engine.catalogue.versions(alias.tenant, alias.adapter))
        if usable != alias:
            _log.warning("alias %s leads to a version that is not there; add its folder again, or move it", alias)
        if usable is not None:
            engine.set_alias(usable).result()
    known = {(alias.tenant, alias.adapter) for alias in kept if alias.name == DEFAULT_ALIAS}
    aliases = engine.catalogue.aliases()
    new = tuple(a for a in aliases if a.name == DEFAULT_ALIAS and (a.tenant, a.adapter) not in known)
    if new:
        store.commit(Changes(put_aliases=new))
    for adapter in sorted(store.pins()):
        engine.pin(adapter).add_done_callback(
            lambda future, adapter=adapter: (
                _log.warning("adapter %s cannot be pinned: %s", adapter, error)
                if (error := future.exception()) is not None
                else None
            )
        )


def _wait_for_examination(engine: Engine) -> None:
    deadline = time.monotonic() + _EXAMINE_WAIT_S
    waiting = engine.catalogue.all()
    while waiting and time.monotonic() < deadline:
        time.sleep(0.005)
        waiting = [info for info in waiting if info.path is not None and not engine.catalogue.get(info.id).is_read]
    if waiting:
        _log.info("%d adapters are still to be examined, which goes on while requests are answered", len(waiting))


def preload(engine: Engine, references: tuple[str, ...]) -> None:
    """Load the named adapters, all at once; raises StartupError for the first that cannot be."""
    try:
        adapters = [engine.catalogue.resolve(AdapterRef.parse(reference)).id for reference in references]
        loads = [engine.load(adapter) for adapter in adapters]
        for load in loads:
            load.result()
    except MultiloraError as error:
        raise StartupError(f"--preload: {error.message}") from error


def _first_line(error: Exception) -> str:
    """Libraries explain at length; the first line says what is wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
