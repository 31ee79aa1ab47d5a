"""Those who are told what the engine does."""

from __future__ import annotations

import logging

from lora_runtime.errors import MultiloraError
from lora_runtime.types import AdapterId, AdapterInfo, AdapterState, Alias, BatchStats, Request, Result

logger = logging.getLogger(__name__)


class EngineObserver:
    """Told of what happens, in the engine thread: be quick. What it raises is logged and ignored.

    Every method does nothing until it is overridden.
    """

    def on_batch(self, stats: BatchStats) -> None: ...

    def on_result(self, request: Request, result: Result | MultiloraError) -> None: ...

    def on_adapter(self, info: AdapterInfo) -> None: ...

    def on_deleted(self, adapter: AdapterId) -> None: ...

    def on_evicted(self, adapter: AdapterId, tier: str) -> None:
        """Its image made room for another's; `tier` is `device` or `host`. An unload that was asked for is none."""

    def on_alias(self, alias: Alias) -> None: ...

    def on_alias_deleted(self, alias: Alias) -> None: ...


class Observers(EngineObserver):
    """All of them, as one observer that cannot fail."""

    def __init__(self) -> None:
        self._observers: list[EngineObserver] = []

    def add(self, observer: EngineObserver) -> None:
        self._observers.append(observer)

    def on_batch(self, stats: BatchStats) -> None:
        self._tell("on_batch", stats)

    def on_result(self, request: Request, result: Result | MultiloraError) -> None:
        self._tell("on_result", request, result)

    def on_adapter(self, info: AdapterInfo) -> None:
        _log_state(info)
        self._tell("on_adapter", info)

    def on_deleted(self, adapter: AdapterId) -> None:
        logger.info("adapter %s is deleted", adapter)
        self._tell("on_deleted", adapter)

    def on_evicted(self, adapter: AdapterId, tier: str) -> None:
        self._tell("on_evicted", adapter, tier)

    def on_alias(self, alias: Alias) -> None:
        self._tell("on_alias", alias)

    def on_alias_deleted(self, alias: Alias) -> None:
        self._tell("on_alias_deleted", alias)

    def _tell(self, event: str, *facts: object) -> None:
        for observer in self._observers:
            try:
                getattr(observer, event)(*facts)
            except Exception:
                logger.exception("observer %s failed in %s", type(observer).__name__, event)


def _log_state(info: AdapterInfo) -> None:
    """The states an operator wants to see; the rest only when debugging."""
    if info.state is AdapterState.FAILED and info.failure is not None:
        logger.warning("adapter %s is refused: %s", info.id, info.failure.message)
    elif info.state is AdapterState.READY:
        size, seconds = info.resident_bytes / 2**20, info.load_seconds or 0.0
        logger.info("adapter %s is loaded: %.1f MiB in %.0f ms", info.id, size, 1000 * seconds)
    else:
        logger.debug("%s: %s", info.id, info.state)
