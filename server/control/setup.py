"""The control plane of one server: its state, its folders, and how they are opened and closed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lora_runtime.adapters.sources.fetch import Fetcher, default_fetcher
from lora_runtime.errors import MultiloraError
from lora_runtime.observers import EngineObserver
from server.backend import BackendSlot
from server.control.places import Places
from server.control.plane import ControlPlane
from server.control.state import StateError, StateStore
from server.control.uploads import UploadReceiver
from server.settings import MIB, ServeSettings
from server.startup import BackendFactory, Prepared, StartupError, prepare_backend


class Control:
    """Opens the state at once: a folder that another server uses is no reason to load a base."""

    def __init__(self, settings: ServeSettings, slot: BackendSlot) -> None:
        self._settings = settings
        state = None if settings.state is None else settings.state.resolve()
        with ExitStack() as undo:
            self._store = _open_store(state)
            undo.callback(self._store.close)
            cache = state / "cache" if state else Path(undo.enter_context(tempfile.TemporaryDirectory()))
            self._fetcher = _open_cache(cache, settings)
            self._places = Places(settings.adapters, settings.sources, state)
            uploads = None if state is None else UploadReceiver(state, settings.max_upload_mib * MIB)
            if uploads is not None:
                _clean(uploads, self._store, self._places)
            self._resources = undo.pop_all()
        self.plane = ControlPlane(slot, self._store, self._places, self._fetcher, uploads)

    def prepare(self, factory: BackendFactory, observers: Sequence[EngineObserver]) -> Prepared:
        """See `prepare_backend`."""
        return prepare_backend(self._settings, factory, self._fetcher, observers, self._store, self._places)

    def close(self) -> None:
        """Let another server use the folders."""
        self._resources.close()


def _open_store(state: Path | None) -> StateStore:
    try:
        return StateStore(state)
    except StateError as error:
        raise StartupError(f"--state: {error.message}") from error


def _open_cache(folder: Path, settings: ServeSettings) -> Fetcher:
    try:
        return default_fetcher(folder, settings.cache_mib * MIB, 3 * settings.arena_mib * MIB)
    except OSError as error:
        raise StartupError(f"--state: the cache in it cannot be used: {error.strerror or error}") from error


def _clean(uploads: UploadReceiver, store: StateStore, places: Places) -> None:
    """Remove what a kill left: uploads that were not acknowledged."""
    try:
        uploads.clean_incoming()
        uploads.remove_all_but({places.stored(kept.id) for kept in store.registrations() if kept.uploaded})
    except (MultiloraError, OSError) as error:
        raise StartupError(f"--state: {error}") from error
