"""Values that follow their files: a changed file is read again, and a broken one changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")

_Stamp: TypeAlias = "tuple[int, int, int, int] | None"
OnError: TypeAlias = Callable[[Exception], None]


class Reloading(Generic[T]):
    """A value made from one or more files; `value` is always the last good one.

    The first load happens at once and raises what is wrong. `poll` may be called from any thread.
    """

    def __init__(self, path: Path | Sequence[Path], load: Callable[[], T], on_error: OnError) -> None:
        self._paths = (path,) if isinstance(path, Path) else tuple(path)
        self._load = load
        self._on_error = on_error
        self._polling = threading.Lock()
        self._stamps = self._look()  # before the load: a change during it is then seen by the next poll
        self._failure: str | None = None
        self._value = load()

    @property
    def value(self) -> T:
        return self._value

    def poll(self) -> bool:
        """Look at the files, and load again if one changed. True: the value is a new one.

        A failure keeps the value and is tried again at each poll, but told only once: it may be transient, as half of a
        certificate and its key is.
        """
        with self._polling:
            stamps = self._look()
            if stamps == self._stamps and self._failure is None:
                return False
            try:
                value = self._load()
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the new file, the old value serves on
                if (stamps, str(error)) != (self._stamps, self._failure):
                    self._on_error(error)
                self._stamps, self._failure = stamps, str(error)
                return False
            self._value, self._stamps, self._failure = value, stamps, None
            return True

    def _look(self) -> tuple[_Stamp, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> _Stamp:
    """What changes when a file is written, replaced, or its symlink moved; None: it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


async def poll_every(seconds: float, poll: Callable[[], object]) -> None:
    """Call `poll`, which reads files, in a thread every `seconds`, until cancelled."""
    while True:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(poll)
