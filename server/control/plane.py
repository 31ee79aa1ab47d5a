"""The control plane: what changes adapters, in an order that survives a kill at any moment.

Changes of one adapter come one after the other. Each is checked and prepared in the engine, then committed to the state
directory together with its answer, and only then done or answered: what was acknowledged is kept, and what was not
leaves nothing behind. A caller that goes away does not stop a change half way.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from google.protobuf.message import Message

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.errors import AdapterInUse, InvalidRequest, MultiloraError, NoPreviousVersion
from lora_runtime.types import DEFAULT_ALIAS, AdapterId, AdapterInfo, Alias, Unloaded
from server.backend import BackendSlot, Engine, Fetching, completion
from server.control.locks import KeyedLocks
from server.control.places import Places
from server.control.state import Changes, Reply, StateStore
from server.control.surviving import surviving
from server.control.uploads import Upload, UploadReceiver

_MAX_REQUEST_ID = 128
_MAX_RESOLVES = 8

_log = logging.getLogger(__name__)
T = TypeVar("T")
ReplyT = TypeVar("ReplyT", bound=Message)


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a deletion freed, in bytes."""

    unloaded: Unloaded
    disk_bytes: int


@dataclass(slots=True)
class Once:
    """The idempotency of one call: its answer is committed with the change."""

    key: str  # empty: the caller gave no request id
    method: str
    request_sha256: str

    def committed(self, changes: Changes, reply: Message) -> Changes:
        if not self.key:
            return changes
        kept = Reply(self.key, self.method, self.request_sha256, reply.SerializeToString(deterministic=True))
        return replace(changes, reply=kept)


class ControlPlane:
    """Belongs to the asyncio loop. `uploads` is None without a state directory."""

    def __init__(
        self,
        slot: BackendSlot,
        store: StateStore,
        places: Places,
        fetcher: Fetching,
        uploads: UploadReceiver | None,
    ) -> None:
        self.places = places
        self.uploads = uploads
        self._slot = slot
        self._store = store
        self._fetcher = fetcher
        self._locks = KeyedLocks()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = threading.Event()
        # of their own: a store that does not answer must not keep the threads that write the state
        self._resolvers = ThreadPoolExecutor(_MAX_RESOLVES, "resolve-url")

    @property
    def engine(self) -> Engine:
        return self._slot.get().engine

    async def once(
        self,
        tenant: str,
        method: str,
        request: Message,
        request_id: str,
        reply_type: type[ReplyT],
        change: Callable[[Once], Coroutine[Any, Any, ReplyT]],
    ) -> ReplyT:
        """The answer of `change`, which runs to its end even if the caller goes away; a repetition gets the first."""
        if len(request_id) > _MAX_REQUEST_ID:
            raise InvalidRequest("request_id", f"has {len(request_id)} characters, the limit is {_MAX_REQUEST_ID}")
        sha256 = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
        once = Once(f"{tenant}/{request_id}" if request_id else "", method, sha256)

        async def run() -> ReplyT:
            if not once.key:
                return await change(once)
            async with self._locks.hold(once.key):
                known = await asyncio.to_thread(self._store.replay, once.key, method, sha256)
                return await change(once) if known is None else reply_type.FromString(known)

        return await self._to_the_end(run())

    async def register_folder(
        self,
        tenant: str,
        name: str,
        version: int | None,
        origin: Origin,
        reply: Callable[[AdapterInfo], ReplyT],
        once: Once,
    ) -> ReplyT:
        """List a folder or URL as a version of an adapter."""
        async with self._locks.hold((tenant, name)):
            adapter = self._version(tenant, name, version)
            info = await completion(self.engine.register(adapter, origin))
            changes = Changes(put_registration=self.places.registration(adapter, origin))
            return await self._keep_registered(info, changes, reply(info), once)

    def check_new(self, tenant: str, name: str, version: int | None) -> None:
        """Refuse before the first byte what could not be registered after the last; raises AdapterAlreadyExists."""
        self.engine.catalogue.check_free(self._version(tenant, name, version))

    async def register_upload(
        self,
        tenant: str,
        name: str,
        version: int | None,
        upload: Upload,
        reply: Callable[[AdapterInfo], ReplyT],
        once: Once,
    ) -> ReplyT:
        """Move an upload to its place, then list it; refused or not kept, it leaves nothing."""
        assert self.uploads is not None
        async with self._locks.hold((tenant, name)):
            adapter = self._version(tenant, name, version)
            self.engine.catalogue.check_free(adapter)
            folder = self.places.stored(adapter)
            await asyncio.to_thread(upload.finish, folder)
            try:
                info = await completion(self.engine.register(adapter, Origin(str(folder))))
                kept = replace(self.places.registration(adapter, Origin("upload://")), url="", uploaded=True)
                return await self._keep_registered(info, Changes(put_registration=kept), reply(info), once)
            except BaseException:
                await asyncio.to_thread(self.uploads.remove_stored, folder)
                raise

    async def resolve_url(self, url: str, tenant: str) -> Origin:
        """Pin a URL that the operator allows."""
        self.places.check_url(url, tenant)
        return await self._pinned(url)

    async def _pinned(self, url: str) -> Origin:
        if "://" not in url:
            return Origin(url)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._resolvers, self._fetcher.resolve, url, self._stopping)

    async def pin(self, adapter: AdapterId, pinned: bool, reply: Callable[[AdapterInfo], ReplyT], once: Once) -> ReplyT:
        """Load and keep, or let go."""
        async with self._locks.hold((adapter.tenant, adapter.name)):
            before = self.engine.catalogue.get(adapter).pinned
            info = await completion(self.engine.pin(adapter, pinned=pinned))
            message = reply(info)
            try:
                await self._commit(once.committed(Changes(set_pin=(adapter, pinned)), message))
            except MultiloraError:
                await completion(self.engine.pin(adapter, pinned=before))
                raise
            return message

    async def set_alias(self, wanted: Alias, reply: Callable[[Alias], ReplyT], once: Once) -> ReplyT:
        """Load what the alias is to lead to, then move it."""
        async with self._locks.hold((wanted.tenant, wanted.adapter)):
            return await self._move(wanted, reply, once)

    async def roll_back(
        self, tenant: str, name: str, alias_name: str, reply: Callable[[Alias], ReplyT], once: Once
    ) -> ReplyT:
        """Take an alias's canary away, or lead it back to where it was before its last move."""
        async with self._locks.hold((tenant, name)):
            alias = self.engine.catalogue.alias(tenant, name, alias_name)
            if alias.canary_version is not None:
                return await self._move(Alias(tenant, name, alias_name, alias.version), reply, once)
            if alias.previous_version is None:
                raise NoPreviousVersion(str(alias))
            return await self._move(Alias(tenant, name, alias_name, alias.previous_version), reply, once)

    async def delete_alias(self, tenant: str, name: str, alias_name: str, reply: ReplyT, once: Once) -> ReplyT:
        async with self._locks.hold((tenant, name)):
            alias = self.engine.catalogue.alias(tenant, name, alias_name)
            if alias_name == DEFAULT_ALIAS:
                raise InvalidRequest("alias", "default cannot be removed: a bare name follows it; move it instead")
            await self._commit(once.committed(Changes(delete_alias=alias), reply))
            await completion(self.engine.delete_alias(tenant, name, alias_name))
            return reply

    async def delete(self, adapter: AdapterId, reply: Callable[[Deleted], ReplyT], once: Once) -> ReplyT:
        """Forget a version, then free what it holds."""
        async with self._locks.hold((adapter.tenant, adapter.name)):
            engine = self.engine
            info = engine.catalogue.get(adapter)
            engine.catalogue.check_removable(adapter)
            if info.pinned:
                raise AdapterInUse(str(adapter), "is pinned; unpin it first")
            disk_bytes = await asyncio.to_thread(self._disk_bytes, info)
            message = reply(Deleted(Unloaded(info, info.resident_bytes, info.host_bytes), disk_bytes))
            default = next((alias for alias in self._default_of(adapter) if adapter.version in alias.versions), None)
            await self._commit(once.committed(Changes(delete_adapter=adapter, delete_alias=default), message))
            await completion(engine.delete(adapter, force=True))
            await asyncio.to_thread(self._free_disk, info)
            return message

    async def forget(self, adapter: AdapterId) -> None:
        """A folder is gone from the root: so is its version, and every alias that led to it alone.

        The state keeps them for the day the folder comes back.
        """
        async with self._locks.hold((adapter.tenant, adapter.name)):
            catalogue = self.engine.catalogue
            left = [
                version for version in catalogue.versions(adapter.tenant, adapter.name) if version != adapter.version
            ]
            for alias in catalogue.aliases(adapter.tenant, adapter.name):
                kept = surviving(alias, left)
                if kept is not None and kept != alias:
                    await completion(self.engine.set_alias(kept))
            await completion(self.engine.delete(adapter, force=True))

    async def discover(self, adapter: AdapterId, url: str) -> None:
        """A folder has come to the root, or has come back."""
        origin = await self._pinned(url)
        async with self._locks.hold((adapter.tenant, adapter.name)):
            try:
                await completion(self.engine.register(adapter, origin, keep_failed=True))
            finally:  # one that is refused is listed all the same
                await self._restore(adapter)

    async def close(self) -> None:
        """Wait for changes that have begun, and for nothing new."""
        self._stopping.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _move(self, wanted: Alias, reply: Callable[[Alias], ReplyT], once: Once) -> ReplyT:
        alias = self.engine.catalogue.moved_alias(wanted)
        for version in alias.versions:
            await completion(self.engine.load(AdapterId(alias.tenant, alias.adapter, version)))
        message = reply(alias)
        await self._commit(once.committed(Changes(put_aliases=(alias,)), message))
        await completion(self.engine.set_alias(alias))
        return message

    async def _restore(self, adapter: AdapterId) -> None:
        """Aliases and the pin that are kept of an adapter; where its bare name leads is kept from now on."""
        of = adapter.tenant, adapter.name
        kept, pins = await asyncio.to_thread(lambda: (self._store.aliases(of), self._store.pins(of)))
        versions = self.engine.catalogue.versions(adapter.tenant, adapter.name)
        for alias in kept:
            usable = surviving(alias, versions)
            if usable is not None and usable not in self.engine.catalogue.aliases(adapter.tenant, adapter.name):
                await completion(self.engine.set_alias(usable))
        if not any(alias.name == DEFAULT_ALIAS for alias in kept):
            await self._commit(Changes(put_aliases=tuple(self._default_of(adapter))))
        if adapter in pins:
            self.engine.pin(adapter)  # how that went is in its state

    async def _keep_registered(self, info: AdapterInfo, changes: Changes, reply: ReplyT, once: Once) -> ReplyT:
        if self.engine.catalogue.versions(info.id.tenant, info.id.name) == [info.id.version]:
            changes = replace(changes, put_aliases=tuple(self._default_of(info.id)))
        try:
            await self._commit(once.committed(changes, reply))
        except BaseException:
            await completion(self.engine.delete(info.id, force=True))
            raise
        return reply

    def _default_of(self, adapter: AdapterId) -> list[Alias]:
        aliases = self.engine.catalogue.aliases(adapter.tenant, adapter.name)
        return [alias for alias in aliases if alias.name == DEFAULT_ALIAS]

    def _version(self, tenant: str, name: str, version: int | None) -> AdapterId:
        versions = self.engine.catalogue.versions(tenant, name)
        return AdapterId(tenant, name, max(versions, default=0) + 1 if version is None else version)

    def _disk_bytes(self, info: AdapterInfo) -> int:
        if self.uploads is not None and self.places.is_upload(info):
            return self.uploads.stored_bytes(self.places.stored(info.id))
        return self._fetcher.cached_bytes(Origin(info.source, info.revision))

    def _free_disk(self, info: AdapterInfo) -> None:
        try:
            if self.uploads is not None and self.places.is_upload(info):
                self.uploads.remove_stored(self.places.stored(info.id))
            else:
                self._fetcher.evict(Origin(info.source, info.revision))
        except (MultiloraError, OSError) as error:  # the version is gone for good, whatever becomes of its files
            _log.warning("the files of the deleted %s stay until the server restarts: %s", info.id, error)

    async def _commit(self, changes: Changes) -> None:
        await asyncio.to_thread(self._store.commit, changes)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("a change ended with %s", error)  # its caller, if it is still there, is told
