"""API keys, `ml_<id>_<secret>`, and the file that remembers what is needed to recognise them.

Of a secret only HMAC-SHA256 under a salt of its own is kept. A slow hash (scrypt, argon2) protects passwords, which can
be guessed; a secret here is 256 random bits, which cannot, so a fast hash loses nothing and thousands of requests a
second can be checked.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from lora_runtime.adapters.sources.disk import sync
from server.control.disk import sync_file
from server.tenancy.auth_file import KeyFileError, Name
from server.tenancy.model import Principal, Role
from server.tenancy.reload import OnError, Reloading

KEY_PREFIX = "ml_"
MAX_NOTE_CHARS = 200
_TOKEN = re.compile(r"ml_([a-z2-7]{12})_([A-Za-z0-9_-]{43})")
_ID = r"^[a-z2-7]{12}$"
_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"  # base32
_ID_CHARS = 12
_BYTES_32 = r"^[0-9a-f]{64}$"


class StoredKey(BaseModel):
    """What is kept of a key: everything but its secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=_ID)]
    salt: Annotated[str, Field(pattern=_BYTES_32)]
    digest: Annotated[str, Field(pattern=_BYTES_32)]  # HMAC-SHA256(salt, secret)
    tenant: Name
    roles: Annotated[frozenset[Role], Field(min_length=1)]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    note: Annotated[str, Field(max_length=MAX_NOTE_CHARS)] = ""

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]  # of this file
    keys: tuple[StoredKey, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A key, ready to be compared."""

    salt: bytes
    digest: bytes
    principal: Principal
    ends_unix_s: float  # from then on it is refused


class KeyRing:
    """The keys of one reading of the file."""

    def __init__(self, keys: Iterable[StoredKey]) -> None:
        self._known = {key.id: _known(key) for key in keys}
        # an unknown id is compared with this, so that it takes as long as a known one
        nobody = Principal("nobody", frozenset(), "nobody")
        self._nobody = _Known(secrets.token_bytes(32), secrets.token_bytes(32), nobody, -1.0)

    def verify(self, token: str, now_unix_s: float) -> Principal | None:
        """Whose key it is, None if it is malformed, unknown, wrong, expired or revoked."""
        known = self._proven(token)
        return known.principal if known is not None and now_unix_s < known.ends_unix_s else None

    def id_of(self, token: str) -> str:
        """Id of the key that a token is, also of one that is revoked or expired; empty if it is none of these keys."""
        known = self._proven(token)
        return "" if known is None else known.principal.name

    @property
    def tenants(self) -> frozenset[str]:
        """Tenants of all keys, of those that are revoked or expired too."""
        return frozenset(known.principal.tenant for known in self._known.values())

    def _proven(self, token: str) -> _Known | None:
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        known = self._known.get(match[1], self._nobody)
        is_right = hmac.compare_digest(_digest(known.salt, match[2]), known.digest)
        return known if is_right else None


class KeyStore:
    """The file of keys, for whoever changes it. Each change holds a lock and replaces the file as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.realpath(path))  # a symlink is followed, not replaced

    def create(
        self, tenant: str, roles: Iterable[Role], now: datetime, expires: datetime | None = None, note: str = ""
    ) -> tuple[str, StoredKey]:
        """Add a key; returns it whole, which nothing can do later, and what is kept of it.

        Raises KeyFileError; ValueError when the tenant is no name, there is no role or the note is too long.
        """
        secret = secrets.token_urlsafe(32)
        salt = secrets.token_bytes(32)
        key_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_CHARS))
        key = StoredKey(
            id=key_id,
            salt=salt.hex(),
            digest=_digest(salt, secret).hex(),
            tenant=tenant,
            roles=frozenset(roles),
            created=now,
            expires=expires,
            note=note,
        )
        with self._changing():
            keys = read_keys(self._path) if self._path.exists() else ()
            self._write((*keys, key))
        return f"{KEY_PREFIX}{key_id}_{secret}", key

    def list(self) -> Sequence[StoredKey]:
        """All keys, oldest first. Raises KeyFileError."""
        return read_keys(self._path)

    def revoke(self, key_id: str, now: datetime) -> StoredKey:
        """Make a key worthless for good; one that is revoked keeps its time. Raises KeyFileError."""
        with self._changing():
            keys = {key.id: key for key in read_keys(self._path)}
            if key_id not in keys:
                raise KeyFileError(f"{self._path}: has no key {key_id[:40]!r}; `multilora keys list` shows the ids")
            if keys[key_id].revoked is None:
                keys[key_id] = keys[key_id].model_copy(update={"revoked": now})
                self._write(keys.values())
        return keys[key_id]

    @contextmanager
    def _changing(self) -> Generator[None]:
        """Hold the file's lock: on a file beside it, since the file itself is replaced."""
        try:
            descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, keys: Iterable[StoredKey]) -> None:
        stored = [key.model_dump(mode="json") for key in keys]
        text = json.dumps({"format": 1, "keys": [{**key, "roles": sorted(key["roles"])} for key in stored]}, indent=1)
        temporary = None
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)  # mode 0600
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(text.encode() + b"\n")
                sync_file(stream)
            os.replace(temporary, self._path)
            sync(self._path.parent)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise _cannot_write(self._path, error) from error


class WatchedKeys:
    """The keys of a file as the server uses them: read at once, and again when the file changes."""

    def __init__(self, path: Path, on_error: OnError) -> None:
        self._ring = Reloading(path, lambda: KeyRing(read_keys(path)), on_error)

    def verify(self, token: str, now_unix_s: float) -> Principal | None:
        return self._ring.value.verify(token, now_unix_s)

    def id_of(self, token: str) -> str:
        return self._ring.value.id_of(token)

    @property
    def tenants(self) -> frozenset[str]:
        return self._ring.value.tenants

    def poll(self) -> bool:
        return self._ring.poll()


def read_keys(path: Path) -> tuple[StoredKey, ...]:
    """The keys of a file. Raises KeyFileError."""
    try:
        keys = _KeyFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError as error:
        raise KeyFileError(f"{path}: is not there; `multilora keys create --file {path} …` makes it") from error
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise KeyFileError(f"{path}: is no file of keys: {place or 'file'}: {fault['msg']}; restore it") from error
    if len({key.id for key in keys}) < len(keys):
        raise KeyFileError(f"{path}: has an id twice; remove one of the two")
    return keys


def _digest(salt: bytes, secret: str) -> bytes:
    # the text is hashed, not what it decodes to: two texts can decode to the same bytes
    return hmac.digest(salt, secret.encode("ascii"), "sha256")


def _known(key: StoredKey) -> _Known:
    ends = float("inf") if key.expires is None else key.expires.timestamp()
    principal = Principal(key.tenant, key.roles, key.id)
    return _Known(bytes.fromhex(key.salt), bytes.fromhex(key.digest), principal, 0.0 if key.revoked else ends)


def _cannot_write(path: Path, error: OSError) -> KeyFileError:
    return KeyFileError(f"{path}: cannot be written ({error.strerror}); choose a folder that can be")


def utc_now() -> datetime:
    """To the second: what people read."""
    return datetime.now(UTC).replace(microsecond=0)
