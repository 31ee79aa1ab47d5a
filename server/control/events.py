"""What changed, in order, for those who watch: a ring of the last changes that every reader follows by itself."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lora_runtime.errors import EngineStopped, InvalidRequest, MultiloraError
from lora_runtime.observers import EngineObserver
from lora_runtime.types import AdapterId, AdapterInfo, Alias

_NONCE_BYTES, _SEQUENCE_BYTES, _TAG_BYTES = 12, 8, 16


@dataclass(frozen=True, slots=True)
class AdapterChanged:
    """An adapter is new, or something of it changed."""

    info: AdapterInfo

    @property
    def tenant(self) -> str:
        return self.info.id.tenant


@dataclass(frozen=True, slots=True)
class AdapterDeleted:
    """An adapter version is gone."""

    id: AdapterId

    @property
    def tenant(self) -> str:
        return self.id.tenant


@dataclass(frozen=True, slots=True)
class AliasChanged:
    """An alias is new, or leads elsewhere."""

    alias: Alias

    @property
    def tenant(self) -> str:
        return self.alias.tenant


@dataclass(frozen=True, slots=True)
class AliasDeleted:
    """An alias is gone; it led here last."""

    alias: Alias

    @property
    def tenant(self) -> str:
        return self.alias.tenant


Event = AdapterChanged | AdapterDeleted | AliasChanged | AliasDeleted


class WatchTooSlow(MultiloraError):
    """A reader is further behind than the server remembers."""

    reason = "WATCH_TOO_SLOW"

    def __init__(self, capacity: int) -> None:
        super().__init__(
            f"the reader is more than {capacity} changes behind; read faster, and resume with the last resume_token",
            capacity=capacity,
        )


class EventLog:
    """The last `capacity` changes, numbered from 1 since the server started; any thread may append.

    Appending costs one wake-up per event loop that has waiting followers, and followers that do not wait cost nothing.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        assert capacity > 0, capacity
        self._capacity = capacity
        # held for a few instructions, never across a wait; re-entrant, because the garbage collector may end a follower
        # of a closed loop, which takes it, in a thread that holds it
        self._mutex = threading.RLock()
        self._ring: list[Event | None] = [None] * capacity  # event n is at n % capacity
        self._latest = 0
        self._waiting: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}
        self._cipher = AESGCM(AESGCM.generate_key(128))  # of this process: tokens from before a restart mean nothing
        self._closed = False

    @property
    def latest(self) -> int:
        """Sequence number of the last event; 0 before the first."""
        return self._latest

    @property
    def num_waiting(self) -> int:
        """Followers that have read everything."""
        with self._mutex:
            return sum(len(futures) for futures in list(self._waiting.values()))

    def append(self, event: Event) -> int:
        """Tell every follower; the event's sequence number."""
        with self._mutex:
            sequence = self._latest = self._latest + 1
            self._ring[sequence % self._capacity] = event
        self._wake_all()
        return sequence

    def close(self) -> None:
        """Nothing that a reader would wait for comes any more."""
        self._closed = True
        self._wake_all()

    def _wake_all(self) -> None:
        with self._mutex:
            waiting, self._waiting = self._waiting, {}
        for loop, futures in waiting.items():
            try:
                loop.call_soon_threadsafe(_wake, futures)
            except RuntimeError:  # the loop is closed, and its followers with it
                continue

    def token_of(self, sequence: int) -> str:
        """An opaque text from which `after` gets back to the place behind this event.

        Enciphered, since the number counts the changes of every tenant.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        hidden = self._cipher.encrypt(nonce, sequence.to_bytes(_SEQUENCE_BYTES), None)
        return base64.urlsafe_b64encode(nonce + hidden).decode()

    def after(self, token: str) -> int | None:
        """The sequence number to follow from; None when what came after it is not remembered (all of) any more.

        Raises InvalidRequest on field `resume_token` when it is no token.
        """
        nonce, hidden = _parse_token(token)
        try:
            sequence = int.from_bytes(self._cipher.decrypt(nonce, hidden, None))
        except InvalidTag:  # of another process
            return None
        latest = self._latest
        return sequence if latest - self._capacity <= sequence <= latest else None

    async def follow(self, sequence: int, tenant: str | None) -> AsyncGenerator[tuple[int, Event]]:
        """Events after `sequence` with their numbers, in order, those to come too; of one tenant, or of all.

        Raises WatchTooSlow when the next event is not in the ring any more, EngineStopped after the last of a closed
        log.
        """
        while True:
            event = self._read(sequence + 1)
            if event is None and self._closed:
                raise EngineStopped("the server is stopping; watch another replica, or this one when it is back")
            if event is None:
                await self._wait(sequence + 1)
                continue
            sequence += 1
            if tenant is None or event.tenant == tenant:
                yield sequence, event

    def _read(self, sequence: int) -> Event | None:
        """None when there is no such event yet."""
        with self._mutex:
            if sequence > self._latest:
                return None
            if sequence <= self._latest - self._capacity:
                raise WatchTooSlow(self._capacity)
            return self._ring[sequence % self._capacity]

    async def _wait(self, sequence: int) -> None:
        """Until there is an event of that number."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._mutex:
            if sequence <= self._latest or self._closed:  # it came between the read and here
                return
            self._waiting.setdefault(loop, set()).add(future)
        try:
            await future
        finally:
            self._forget(loop, future)

    def _forget(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
        with self._mutex:
            futures = self._waiting.get(loop)
            if futures is None:
                return
            futures.discard(future)
            if not futures:
                del self._waiting[loop]


def _wake(futures: set[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # a follower may have gone away meanwhile
            future.set_result(None)


def _parse_token(token: str) -> tuple[bytes, bytes]:
    """Nonce and the enciphered number."""
    try:
        data = base64.b64decode(token, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != _NONCE_BYTES + _SEQUENCE_BYTES + _TAG_BYTES:
        raise InvalidRequest("resume_token", "is not a resume_token of this service; leave it empty to begin anew")
    return data[:_NONCE_BYTES], data[_NONCE_BYTES:]


class EventObserver(EngineObserver):
    """Writes what the engine tells into a log."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def on_adapter(self, info: AdapterInfo) -> None:
        self._log.append(AdapterChanged(info))

    def on_deleted(self, adapter: AdapterId) -> None:
        self._log.append(AdapterDeleted(adapter))

    def on_alias(self, alias: Alias) -> None:
        self._log.append(AliasChanged(alias))

    def on_alias_deleted(self, alias: Alias) -> None:
        self._log.append(AliasDeleted(alias))
