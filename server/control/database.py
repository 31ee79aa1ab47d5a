"""The SQLite file of a state directory: made, locked and checked."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from lora_runtime.adapters.sources.disk import sync
from lora_runtime.errors import MultiloraError
from server.control.disk import make_folder

STATE_FILE = "state.sqlite3"
LOCK_FILE = "lock"

_OF_OTHERS = 0o055  # bits of a folder's mode that let group or others look into it

_log = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = f"""
BEGIN;
CREATE TABLE registrations (
    tenant TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
    url TEXT NOT NULL, revision TEXT, uploaded INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, version)
);
CREATE TABLE pins (
    tenant TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, version)
);
CREATE TABLE aliases (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, name TEXT NOT NULL,
    version INTEGER NOT NULL, canary_version INTEGER, canary_percent REAL NOT NULL, previous_version INTEGER,
    PRIMARY KEY (tenant, adapter, name)
);
CREATE TABLE replies (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT NOT NULL UNIQUE, method TEXT NOT NULL, request_sha256 TEXT NOT NULL,
    content BLOB NOT NULL, unix_time_s INTEGER NOT NULL
);
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT;
"""


class StateError(MultiloraError):
    """The state directory cannot be used, so the server does not start."""

    reason = "STATE_UNUSABLE"


def lock_folder(folder: Path) -> int:
    """The descriptor that holds the folder until it is closed, at the latest by the end of the process."""
    try:
        if folder.is_dir() and (mode := folder.stat().st_mode & 0o777) & _OF_OTHERS:
            _log.warning("state directory %s: others can read it (mode %04o); chmod 700 keeps them out", folder, mode)
        make_folder(folder, 0o700)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StateError(f"state directory {folder}: {error.strerror}; name a directory that can be written") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        message = "is used by another server; stop that one, or give each its own directory"
        raise StateError(f"state directory {folder} {message}") from error
    except OSError as error:
        os.close(descriptor)
        message = f"cannot be locked ({error.strerror}); name a directory on a local disk"
        raise StateError(f"state directory {folder} {message}") from error
    return descriptor


def _connect(database: Path | str) -> sqlite3.Connection:
    # transactions are begun by hand; the store's mutex keeps threads apart
    return sqlite3.connect(database, isolation_level=None, check_same_thread=False)


def open_memory() -> sqlite3.Connection:
    """An empty database that ends with its connection."""
    connection = _connect(":memory:")
    connection.executescript(_SCHEMA)
    return connection


def open_file(path: Path) -> sqlite3.Connection:
    """The database at `path`, made when there is none, whose commits survive a power loss. Raises StateError."""
    with ExitStack() as undo, usable(path):
        if not path.exists():
            _create(path)
        connection = _connect(path)
        undo.callback(connection.close)
        _check(connection, path)
        connection.execute("PRAGMA synchronous = FULL")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StateError(f"{path}: its disk cannot keep a write-ahead log; name a directory on a local disk")
        undo.pop_all()
        return connection


def _create(path: Path) -> None:
    """Make a database that appears complete or not at all, so that one without tables is known to be damaged."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists():  # it would be applied to the new database
        raise StateError(f"{path} is missing, but {log.name} is there; restore both, or move the directory away")
    new = path.with_name(f"{path.name}.new")
    for leftover in (new, new.with_name(f"{new.name}-journal")):
        leftover.unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))  # SQLite keeps to this mode
    with closing(_connect(new)) as connection:
        connection.executescript(_SCHEMA)
    new.replace(path)
    sync(path.parent)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise unless the database is whole and of this version."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _SCHEMA_VERSION:
        message = f"was written by a newer server (schema {version}, this one knows {_SCHEMA_VERSION})"
        raise StateError(f"{path} {message}; start that version, or name another directory")
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok" or version < 1:
        raise sqlite3.DatabaseError(verdict if verdict != "ok" else "it has no tables of this server")


@contextmanager
def usable(path: Path | None) -> Generator[None]:
    """Turn what goes wrong with the database as the server starts into a StateError."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise StateError(f"{path}: {error}; check the directory's permissions and its disk") from error
    except sqlite3.DatabaseError as error:
        message = "restore it from a backup, or move the directory away to begin with an empty one"
        raise StateError(f"{path} is damaged ({error}); {message}") from error
