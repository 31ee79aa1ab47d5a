"""What clients changed, in one SQLite file: what a call returned from survives SIGKILL and power loss."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_runtime.errors import InvalidRequest, MultiloraError
from lora_runtime.types import AdapterId, Alias
from server.control.database import STATE_FILE, lock_folder, open_file, open_memory, usable
from server.control.database import StateError as StateError  # what StateStore raises

MAX_REPLIES = 10_000  # of one tenant: how far back a repeated call is recognised

T = TypeVar("T")


class StateUnavailable(MultiloraError):
    """The state directory cannot be read or written right now; what was asked for did not happen.

    Clients get it, so it names no path of the server.
    """

    reason = "STATE_UNAVAILABLE"

    def __init__(self, cause: object) -> None:
        super().__init__(
            f"the server cannot use its state directory: {cause}; nothing was changed, try again once the directory's "
            "disk is writable and has room"
        )


@dataclass(frozen=True, slots=True)
class Registration:
    """An adapter version that a client registered or uploaded."""

    id: AdapterId
    url: str  # relative to the adapter root, of a folder in it
    revision: str | None  # what the URL was pinned to
    uploaded: bool

    @classmethod
    def from_row(
        cls, tenant: str, name: str, version: int, url: str, revision: str | None, uploaded: int
    ) -> Registration:
        return cls(AdapterId(tenant, name, version), url, revision, bool(uploaded))


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a call that may be repeated: the same id gets the same serialised message."""

    request_id: str  # TENANT/ID, so that a tenant's ids are its own
    method: str
    request_sha256: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything one call changes. What is removed goes first, so one call can replace an alias or an adapter."""

    delete_adapter: AdapterId | None = None  # its pin too
    delete_alias: Alias | None = None  # the one of that tenant, adapter and name, wherever it leads
    put_registration: Registration | None = None
    put_aliases: tuple[Alias, ...] = ()
    set_pin: tuple[AdapterId, bool] | None = None
    reply: Reply | None = None


class StateStore:
    """Registrations, pins, aliases and replies; any thread may call. Without a folder, nothing survives.

    Raises StateError when the folder is another server's, cannot be used, or holds what this version cannot read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._mutex = threading.Lock()
        self._path = None if folder is None else folder / STATE_FILE
        with ExitStack() as undo:
            if folder is not None:
                undo.callback(os.close, lock_folder(folder))
            self._connection = open_memory() if self._path is None else open_file(self._path)
            undo.callback(self._connection.close)
            self._resources = undo.pop_all()

    def registrations(self) -> list[Registration]:
        """By tenant, name and version."""
        columns = "tenant, name, version, url, revision, uploaded"
        return self._load(
            f"SELECT {columns} FROM registrations ORDER BY tenant, name, version",
            Registration.from_row,
        )

    def pins(self, of: tuple[str, str] | None = None) -> set[AdapterId]:
        """Of one adapter (tenant, name), or of all."""
        where, values = ("", ()) if of is None else (" WHERE tenant = ? AND name = ?", of)
        return set(self._load(f"SELECT tenant, name, version FROM pins{where}", AdapterId, values))

    def aliases(self, of: tuple[str, str] | None = None) -> list[Alias]:
        """Of one adapter (tenant, name), or of all: by tenant, adapter and name."""
        columns = "tenant, adapter, name, version, canary_version, canary_percent, previous_version"
        where, values = ("", ()) if of is None else (" WHERE tenant = ? AND adapter = ?", of)
        return self._load(f"SELECT {columns} FROM aliases{where} ORDER BY tenant, adapter, name", Alias, values)

    def replay(self, request_id: str, method: str, request_sha256: str) -> bytes | None:
        """The answer this call got before; None for one that is new.

        Raises InvalidRequest on field `request_id` when the id was used for another method or other content.
        """
        with self._mutex, _available():
            return _find_reply(self._connection, request_id, method, request_sha256)

    def commit(self, changes: Changes) -> None:
        """Apply all of it, durably, or none of it.

        Raises StateUnavailable, or InvalidRequest when the reply's id was taken since `replay` was asked.
        """
        with self._mutex, _available():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                _apply(self._connection, changes)
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some failures
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let another server use the folder. Idempotent."""
        with self._mutex:
            self._resources.close()

    def _load(self, query: str, make: Callable[..., T], values: tuple[str, ...] = ()) -> list[T]:
        """Rows as they were kept; what is wrong with them is a StateError."""
        with self._mutex, usable(self._path):
            try:
                return [make(*row) for row in self._connection.execute(query, values)]
            except (MultiloraError, TypeError, ValueError) as error:
                raise sqlite3.DatabaseError(f"a row makes no sense: {error}") from error


@contextmanager
def _available() -> Generator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StateUnavailable(error) from error


def _find_reply(connection: sqlite3.Connection, request_id: str, method: str, request_sha256: str) -> bytes | None:
    query = "SELECT method, request_sha256, content FROM replies WHERE request_id = ?"
    row: tuple[str, str, bytes] | None = connection.execute(query, (request_id,)).fetchone()
    if row is None:
        return None
    if row[:2] != (method, request_sha256):
        raise InvalidRequest("request_id", "was used for another call, or with other content; choose a new one")
    return row[2]


def _apply(connection: sqlite3.Connection, changes: Changes) -> None:
    for statement, values in _statements(changes):
        connection.execute(statement, values)
    if changes.reply is not None:
        _store_reply(connection, changes.reply)


def _statements(changes: Changes) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What `changes` says in SQL, without the reply."""
    if (adapter := changes.delete_adapter) is not None:
        for table in ("registrations", "pins"):
            yield f"DELETE FROM {table} WHERE (tenant, name, version) = (?, ?, ?)", _key(adapter)
    if (alias := changes.delete_alias) is not None:
        key = alias.tenant, alias.adapter, alias.name
        yield "DELETE FROM aliases WHERE (tenant, adapter, name) = (?, ?, ?)", key
    if (put := changes.put_registration) is not None:
        row = *_key(put.id), put.url, put.revision, put.uploaded
        yield "INSERT OR REPLACE INTO registrations VALUES (?, ?, ?, ?, ?, ?)", row
    for alias in changes.put_aliases:
        row = alias.version, alias.canary_version, alias.canary_percent, alias.previous_version
        key = alias.tenant, alias.adapter, alias.name
        yield "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, ?, ?)", (*key, *row)
    if changes.set_pin is not None:
        adapter, pinned = changes.set_pin
        put_pin = "INSERT OR IGNORE INTO pins VALUES (?, ?, ?)"
        yield put_pin if pinned else "DELETE FROM pins WHERE (tenant, name, version) = (?, ?, ?)", _key(adapter)


def _key(adapter: AdapterId) -> tuple[str, str, int]:
    return adapter.tenant, adapter.name, adapter.version


def _store_reply(connection: sqlite3.Connection, reply: Reply) -> None:
    key = reply.request_id, reply.method, reply.request_sha256
    if _find_reply(connection, *key) is not None:
        raise InvalidRequest("request_id", "was answered meanwhile; send the call again to get that answer")
    insert = "INSERT INTO replies (request_id, method, request_sha256, content, unix_time_s) VALUES (?, ?, ?, ?, ?)"
    connection.execute(insert, (*key, reply.content, int(time.time())))
    tenant = reply.request_id.partition("/")[0]
    kept, ends = "FROM replies WHERE request_id >= ? AND request_id < ?", (f"{tenant}/", f"{tenant}0")  # 0 follows /
    (count,) = connection.execute(f"SELECT count(*) {kept}", ends).fetchone()
    if count > MAX_REPLIES:
        connection.execute(f"DELETE FROM replies WHERE sequence = (SELECT min(sequence) {kept})", ends)
