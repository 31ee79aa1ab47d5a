"""The adapter root is watched: folders that appear are registered, folders that go are forgotten, without a restart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from lora_runtime.adapters.sources.scan import Found, Scan, scan_root
from lora_runtime.errors import MultiloraError, SourceUnavailable
from lora_runtime.types import AdapterId, AdapterInfo, AdapterState
from server.backend import completion
from server.control.plane import ControlPlane

_MAX_SHARE = 0.02  # of the time, for scanning: a root of thousands of folders is looked at less often

_log = logging.getLogger(__name__)


class RootWatcher:
    """Belongs to the asyncio loop. What a client registered or deleted is left alone until its files change."""

    def __init__(self, plane: ControlPlane, root: str, first: Scan, scan: Callable[[str], Scan] = scan_root) -> None:
        """`first` is the scan whose adapters are registered already."""
        self._plane = plane
        self._root = root
        self._scan = scan
        self._known = dict(first.found)
        self._arriving: dict[AdapterId, Found] = {}  # seen once: their files may still be being copied
        self._skipped = dict(first.skipped)
        self._doubtful = dict(first.doubtful)

    async def run(self, interval_s: float) -> None:
        """Scan every `interval_s` seconds, or less often where scans take long; until cancelled."""
        pause_s = interval_s
        while True:
            await asyncio.sleep(pause_s)
            started = time.monotonic()
            try:
                await self.look()
            except (OSError, MultiloraError) as error:  # what is registered stays: a root out of reach is not empty
                _log.warning("the adapter root cannot be scanned: %s", error)
            pause_s = max(interval_s, (time.monotonic() - started) / _MAX_SHARE)

    async def look(self) -> None:
        """Scan once, and take up what differs. Raises what the scan raises."""
        scan = await asyncio.to_thread(self._scan, self._root)
        for name, reason in scan.skipped.items():
            if self._skipped.get(name) != reason:
                _log.warning("folder %s is skipped: %s", name, reason)
        for name, doubt in scan.doubtful.items():
            if self._doubtful.get(name) != doubt:
                _log.warning("folder %s is ambiguous: %s", name, doubt)
        self._skipped, self._doubtful = dict(scan.skipped), dict(scan.doubtful)
        for adapter in self._known.keys() - scan.found.keys():
            await self._forget(adapter, self._known.pop(adapter))
        changed = {adapter: found for adapter, found in scan.found.items() if self._known.get(adapter) != found}
        for adapter, found in changed.items():
            if self._arriving.get(adapter) == found:
                await self._take(adapter, found)
        self._arriving = changed

    async def _forget(self, adapter: AdapterId, found: Found) -> None:
        info = self._plane.engine.catalogue.find(adapter)
        if info is None or not _is_from(info, found):  # a client deleted it, or registered other files as that version
            return
        try:
            await self._plane.forget(adapter)
            _log.info("adapter %s is gone from the root", adapter)
        except MultiloraError as error:
            _log.warning("adapter %s is gone from the root: %s", adapter, error.message)

    async def _take(self, adapter: AdapterId, found: Found) -> None:
        """Register a new folder, or read one again whose files changed before it was ever loaded."""
        self._known[adapter] = found
        try:
            info = self._plane.engine.catalogue.find(adapter)
            if info is not None and not _is_from(info, found):
                _log.warning("folder %s is not registered: that version is taken", found.url)
                return
            if info is not None and info.digest is not None and info.state is not AdapterState.FAILED:
                _log.warning("the files of adapter %s changed; a version is immutable, add another", adapter)
                return
            if info is not None and "://" not in found.url:
                await completion(self._plane.engine.examine(adapter))
                return
            if info is not None:  # pinned to what its files were
                await self._plane.forget(adapter)
            await self._plane.discover(adapter, found.url)
        except SourceUnavailable as error:  # it is not registered, so the next look takes it for new
            del self._known[adapter]
            _log.warning("adapter %s is tried again: %s", adapter, error.message)
        except MultiloraError as error:
            _log.warning("adapter %s is refused: %s", adapter, error.message)


def _is_from(info: AdapterInfo, found: Found) -> bool:
    """Whether an adapter's files are those of a folder of the root, however its path is written."""
    if info.path is None or "://" in found.url:
        return info.source == found.url
    return info.path.resolve() == Path(found.url).resolve()
