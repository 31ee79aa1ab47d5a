"""One lock for each key, for as long as somebody wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Hashable
from contextlib import asynccontextmanager


class KeyedLocks:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, tuple[asyncio.Lock, int]] = {}  # with how many want it

    @asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncGenerator[None]:
        """Hold the lock of `key` for the block."""
        lock, wanting = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, wanting + 1
        try:
            async with lock:
                yield
        finally:
            lock, wanting = self._locks[key]
            if wanting == 1:
                del self._locks[key]
            else:
                self._locks[key] = lock, wanting - 1
