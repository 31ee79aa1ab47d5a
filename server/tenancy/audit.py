"""The audit log: who did what to which adapter, and who was denied. JSON lines; no request text, no secrets."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from server.tenancy.model import Principal

_MAX_WAITING = 10_000
_MAX_CHARS = 512  # of one field: a peer chooses some of them
_OVERFLOW_REPORT_S = 60.0
_CLOSE_S = 5.0  # a disk that hangs does not keep the process

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One line, fields in this order."""

    time: str  # RFC 3339, UTC
    principal: str  # name of the credential; empty: nobody was authenticated
    tenant: str
    method: str  # package.Service/Method
    target: str  # the adapter's resource name, or empty
    versions: str  # where an alias was to lead, such as `2` or `2, canary 3 at 5%`; or empty
    outcome: str  # name of the gRPC code
    reason: str  # of the error, or empty
    request_id: str
    peer: str
    key_id: str  # of a right key that is revoked or expired; or empty


class AuditLog:
    """Writes in a thread of its own; `record` never blocks. With path None it does nothing.

    Raises OSError when the file cannot be opened at the start. Later failures cost lines, which `num_lost` counts and
    the server's log tells once per outage: requests are answered all the same.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        max_waiting: int = _MAX_WAITING,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.num_lost = 0  # could not be written
        self.num_overflowed = 0  # came faster than they were written; lost as well
        self._num_reported = 0  # of those that overflowed
        self._max_waiting = max_waiting
        self._wall_clock = wall_clock
        self._waiting: deque[AuditRecord] = deque()
        self._changed = threading.Condition()  # guards `num_overflowed`, `_waiting` and `_closed`
        self._closed = path is None
        self._thread: threading.Thread | None = None
        if path is not None:
            self._file = _AuditFile(path)
            self._thread = threading.Thread(target=self._write_all, name="audit-log", daemon=True)
            self._thread.start()

    def record(
        self,
        principal: Principal | None,
        method: str,
        *,
        outcome: str,
        request_id: str,
        target: str = "",
        versions: str = "",
        reason: str = "",
        peer: str = "",
        key_id: str = "",
    ) -> None:
        """Hand one line to the writer; from any thread."""
        if self._thread is None:
            return
        name, tenant = ("", "") if principal is None else (principal.name, principal.tenant)
        at = datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = (name, tenant, method, target, versions, outcome, reason, request_id, peer, key_id)
        record = AuditRecord(at, *(text[:_MAX_CHARS] for text in fields))
        with self._changed:
            if self._closed or len(self._waiting) >= self._max_waiting:
                self.num_overflowed += 1
                return
            self._waiting.append(record)
            self._changed.notify()

    def close(self) -> None:
        """Write what waits, and end. Blocks for at most 5 seconds: not for the loop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                _log.error("audit log: the disk does not answer; the last lines may be lost")

    def _write_all(self) -> None:
        reported_at = -math.inf
        while batch := self._next_batch():
            self.num_lost += self._file.append(batch)
            if time.monotonic() - reported_at >= _OVERFLOW_REPORT_S and self._report_overflow():
                reported_at = time.monotonic()
        self._report_overflow()
        self._file.close()

    def _report_overflow(self) -> bool:
        """Log how many lines did not fit in since the last report, if any."""
        total = self.num_overflowed
        num_new, self._num_reported = total - self._num_reported, total
        if num_new:
            _log.error("audit log: %d lines are lost, %d wait already; is the disk slow?", num_new, self._max_waiting)
        return num_new > 0

    def _next_batch(self) -> list[AuditRecord]:
        """What waits, at least one record; nothing once the log is closed and all is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch = list(self._waiting)
            self._waiting.clear()
            return batch


class _AuditFile:
    """The file by its path: opened again when something else lies there, as after a rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = _open(path)
        self._torn = False  # the last write stopped inside a line
        self._failing = False

    def append(self, records: list[AuditRecord]) -> int:
        """Write one line for each record; returns how many could not be written."""
        lines = b"".join(json.dumps(asdict(record)).encode() + b"\n" for record in records)
        try:
            fd = self._follow_rotation()
            if self._torn:
                self._torn = os.write(fd, b"\n") == 0
        except OSError as error:
            self._report(error)
            return len(records)
        written = self._write(fd, lines)
        if not written:
            return len(records)
        self._torn = not written.endswith(b"\n")
        return len(records) - written.count(b"\n")

    def _write(self, fd: int, data: bytes) -> bytes:
        """As much of `data` as the disk takes."""
        written = 0
        try:
            while written < len(data):
                written += os.write(fd, data[written:])
        except OSError as error:
            self._report(error)
            return data[:written]
        if self._failing:
            _log.warning("audit log: %s can be written again", self._path)
        self._failing = False
        return data

    def close(self) -> None:
        if self._fd is not None:
            try:
                os.fsync(self._fd)
            except OSError as error:  # a pipe or a device has nothing to flush
                _log.debug("audit log: fsync of %s: %s", self._path, error)
            os.close(self._fd)
            self._fd = None

    def _report(self, error: OSError) -> None:
        if not self._failing:
            _log.error("audit log: cannot write %s (%s); lines are lost until it can", self._path, error.strerror)
        self._failing = True

    def _follow_rotation(self) -> int:
        if self._fd is not None:
            ours = os.fstat(self._fd)
            try:
                there = os.stat(self._path)
            except FileNotFoundError:
                there = None
            if there is not None and (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return self._fd
            os.close(self._fd)
            self._fd = None
        self._fd = _open(self._path)
        self._torn = False
        return self._fd


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
