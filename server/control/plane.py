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
from server.control.uploads import Upload, UploadReceiver

_MAX_REQUEST_ID = 128

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

    async def resolve_url(self, url: str) -> Origin:
        """Pin a URL that the operator allows."""
        self.places.check_url(url)
        return await asyncio.to_thread(self._fetcher.resolve, url, self._stopping)

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
            alias = self.engine.catalogue.moved_alias(wanted)
            for version in alias.versions:
                await completion(self.engine.load(AdapterId(alias.tenant, alias.adapter, version)))
            message = reply(alias)
            await self._commit(once.committed(Changes(put_aliases=(alias,)), message))
            await completion(self.engine.set_alias(alias))
            return message

    async def roll_back(
        self, tenant: str, name: str, alias_name: str, reply: Callable[[Alias], ReplyT], once: Once
    ) -> ReplyT:
        """Lead an alias back to where it was before its last move."""
        alias = self.engine.catalogue.alias(tenant, name, alias_name)
        if alias.previous_version is None:
            raise NoPreviousVersion(str(alias))
        return await self.set_alias(Alias(tenant, name, alias_name, alias.previous_version), reply, once)

    async def delete_alias(self, tenant: str, name: str, alias_name: str, reply: ReplyT, once: Once) -> ReplyT:
        async with self._locks.hold((tenant, name)):
            alias = self.engine.catalogue.alias(tenant, name, alias_name)
            if alias_name == DEFAULT_ALIAS:
                raise InvalidRequest("alias", "default cannot be removed: a bare name follows it; move it instead")
            await self._commit(once.committed(Changes(delete_alias=alias), reply))
            await completion(self.engine.delete_alias(tenant, name, alias_name))
            return reply

    async def delete(self, adapter: AdapterId, reply: Callable[[Deleted], ReplyT], once: Once) -> ReplyT:
        """Forget a version, then free what it holds; how much that was is answered, not kept."""
        async with self._locks.hold((adapter.tenant, adapter.name)):
            engine = self.engine
            info = engine.catalogue.get(adapter)
            engine.catalogue.check_removable(adapter)
            if info.pinned:
                raise AdapterInUse(str(adapter), "is pinned; unpin it first")
            estimate = reply(Deleted(Unloaded(info, info.resident_bytes, info.host_bytes), 0))
            await self._commit(once.committed(Changes(delete_adapter=adapter), estimate))
            unloaded = await completion(engine.delete(adapter, force=True))
            return reply(Deleted(unloaded, await asyncio.to_thread(self._free_disk, info)))

    async def forget(self, adapter: AdapterId) -> None:
        """A folder is gone from the root: so is its version, and every alias that led to it alone."""
        async with self._locks.hold((adapter.tenant, adapter.name)):
            await completion(self.engine.delete(adapter, force=True))

    async def discover(self, adapter: AdapterId, origin: Origin) -> None:
        """A folder has come to the root."""
        async with self._locks.hold((adapter.tenant, adapter.name)):
            is_first = not self.engine.catalogue.versions(adapter.tenant, adapter.name)
            await completion(self.engine.register(adapter, origin, keep_failed=True))
            if is_first:
                await self._commit(Changes(put_aliases=tuple(self._default_of(adapter))))

    async def close(self) -> None:
        """Wait for changes that have begun, and for nothing new."""
        self._stopping.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def _keep_registered(self, info: AdapterInfo, changes: Changes, reply: ReplyT, once: Once) -> ReplyT:
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

    def _free_disk(self, info: AdapterInfo) -> int:
        if self.uploads is not None and self.places.shown(info) == "upload":
            return self.uploads.remove_stored(self.places.stored(info.id))
        return self._fetcher.evict(Origin(info.source, info.revision))

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
