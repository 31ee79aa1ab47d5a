"""From settings to a backend that may serve: load the base, register the folder, preload. All blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from lora_runtime.errors import InvalidRequest, MultiloraError
from lora_runtime.types import DEFAULT_TENANT, AdapterId, AdapterInfo, AdapterRef
from server.backend import Backend, Engine, EngineObserver
from server.settings import MIB, ServeSettings

CONFIG_FILE = "adapter_config.json"

_log = logging.getLogger(__name__)


class StartupError(Exception):
    """The server cannot start; the message says what to change."""


BackendFactory = Callable[[ServeSettings], Backend]


def load_runtime(settings: ServeSettings) -> Backend:
    """The real backend, imported only now: torch takes seconds, in which health is already answered."""
    from lora_runtime.runtime import Runtime, RuntimeSettings

    return Runtime(
        settings.base,
        RuntimeSettings(
            arena_bytes=settings.arena_mib * MIB,
            token_budget=settings.token_budget,
            max_batch_sequences=settings.max_batch_sequences,
            num_loader_threads=settings.loader_threads,
            num_threads=settings.threads,
        ),
    )


def prepare_backend(settings: ServeSettings, factory: BackendFactory, observer: EngineObserver) -> Backend:
    """A backend with the folder registered and the preloads resident; raises StartupError."""
    try:
        backend = factory(settings)
    except (MultiloraError, OSError, ValueError) as error:
        raise StartupError(f"--base: {_first_line(error)}") from error
    try:
        backend.engine.add_observer(observer)
        register_folder(backend.engine, settings.adapters)
        preload(backend.engine, settings.preload)
    except BaseException:
        backend.close(0.0)
        raise
    return backend


def register_folder(engine: Engine, root: Path) -> None:
    """Register each adapter folder as `default/FOLDER@1`; a refused one is kept, with its reason."""
    pending: list[tuple[Path, Future[AdapterInfo]]] = []
    for folder in sorted(path for path in root.iterdir() if _is_adapter(path)):
        try:
            adapter = AdapterId(DEFAULT_TENANT, folder.name, 1)
        except InvalidRequest as error:
            _log.warning("adapter folder %s is skipped: %s; rename it", folder.name, error.description)
            continue
        pending.append((folder, engine.register(adapter, folder, keep_failed=True)))
    for folder, future in pending:
        try:
            future.result()  # one that is kept as refused has been logged by the engine
        except MultiloraError as error:
            _log.warning("adapter %s is refused: %s", folder.name, error.message)


def _is_adapter(folder: Path) -> bool:
    try:
        if (folder / CONFIG_FILE).is_file():
            return True
        # PEFT saves an adapter that has a name in a sub-folder of that name
        return folder.is_dir() and any((child / CONFIG_FILE).is_file() for child in folder.iterdir())
    except OSError as error:  # a folder of somebody else, such as lost+found at the root of a volume
        _log.warning("folder %s is skipped: %s", folder.name, error.strerror)
        return False


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
