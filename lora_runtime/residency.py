"""Which adapter is in which tier: what is asked of adapters, and what batches hold. Owned by the engine thread.

`loads.py` brings adapters to READY; `tiers.py` says who makes room; `records.py` has the table of legal moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.loader import AdapterLoader, CardRead, LoaderMessage
from lora_runtime.adapters.sources.api import Origin
from lora_runtime.arena import BASE_SLOT
from lora_runtime.batch import BASE_CARD, Resident
from lora_runtime.catalogue import Catalogue
from lora_runtime.errors import AdapterFailed, AdapterInUse, AdapterNotFound, InvalidRequest, MultiloraError
from lora_runtime.futures import settle
from lora_runtime.loads import Loads
from lora_runtime.observers import Observers
from lora_runtime.records import Record, Records
from lora_runtime.room import Memory
from lora_runtime.types import (
    BASE_NAME,
    DEFAULT_TENANT,
    AdapterCard,
    AdapterId,
    AdapterInfo,
    AdapterState,
    Alias,
    Pooling,
    Task,
    Unloaded,
)


class Residency:
    """Adapters by state. `observers` are told of every change; `on_failed` of every load that was refused."""

    def __init__(
        self,
        base: BaseSpec,
        memory: Memory,
        loader: AdapterLoader,
        observers: Observers,
        on_ready: Callable[[AdapterInfo], None],
        on_failed: Callable[[AdapterId, MultiloraError], None],
        quota_of: Callable[[str], int | None] = lambda _tenant: None,
    ) -> None:
        """`quota_of` gives the bytes of the device that a tenant's adapters may hold together, None for no bound."""
        self._base = Resident(BASE_SLOT, base.fingerprint.weights_sha256, _base_card(base))
        self.catalogue = Catalogue(_base_info(base, self._base))
        self._memory = memory
        self._loader = loader
        self._observers = observers
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._records = Records(self.catalogue, self._changed, observers.on_alias)
        self._loads = Loads(self._records, memory, loader, base, on_failed, observers.on_evicted, quota_of)
        self._registering: dict[AdapterId, tuple[Origin, Future[AdapterInfo], bool]] = {}
        self._leaving: dict[AdapterId, None] = {}  # to be unloaded or deleted

    def register(
        self, adapter: AdapterId, origin: Origin, future: Future[AdapterInfo], *, examine: bool, keep_failed: bool
    ) -> None:
        """List an adapter, after reading its JSON files if `examine`; see Engine.register."""
        if adapter.is_base:
            raise InvalidRequest("adapter", f"the name {BASE_NAME!r} is reserved for the base model")
        self.catalogue.check_free(adapter, self._registering)
        if adapter in self._records:
            raise AdapterInUse(str(adapter), "is still being deleted; try again in a moment")
        if examine and origin.path is not None:
            self._registering[adapter] = origin, future, keep_failed
            self._loader.examine(adapter, origin.path, urgent=True)
            return
        info = AdapterInfo(adapter, origin.url, origin.path, AdapterState.REGISTERED, None, revision=origin.revision)
        self._records.add(Record(info, origin))
        settle(future, info)
        if origin.path is not None:
            self._loader.examine(adapter, origin.path, urgent=False)

    def examine(self, adapter: AdapterId, future: Future[AdapterInfo]) -> None:
        """Read the JSON files of a local folder again, unless it is loaded; a FAILED one may become REGISTERED."""
        record = self._records.require(adapter)
        if record.origin.path is None or record.state not in (AdapterState.REGISTERED, AdapterState.FAILED):
            settle(future, record.info)
            return
        if record.examination is not None:
            settle(record.examination, record.info)  # an older look at its files, which may have changed since
        record.examination = future
        self._loader.examine(adapter, record.origin.path, urgent=True)

    def is_ready(self, adapter: AdapterId) -> bool:
        """Whether sequences of it may begin: not while it is to go, for good or for a load that waits, when those that
        have begun end first.
        """
        if adapter.is_base:
            return True
        record = self._records.find(adapter)
        if record is None or record.state is not AdapterState.READY:
            return False
        is_going = adapter in self._leaving or adapter in self._loads.yielding
        return record.deleting or not (is_going and record.references)

    def want(self, adapter: AdapterId) -> None:
        """Start a load unless one is under way or done.

        Raises AdapterFailed when the last one was refused, unless its cause may have passed meanwhile.
        """
        if not adapter.is_base:
            self._want(self._records.require(adapter))

    def prefetch(self, adapter: AdapterId, future: Future[AdapterInfo]) -> None:
        """As `want`; `future` gets the snapshot once the adapter's card is known and its files are there."""
        if adapter.is_base:
            settle(future, self.catalogue.get(adapter))
            return
        record = self._records.require(adapter)
        self._want(record)
        if record.info.is_read and record.info.path is not None:
            settle(future, record.info)
        else:
            record.reads.append(future)

    def load(self, adapter: AdapterId, future: Future[AdapterInfo]) -> None:
        """Load, or try again after a refusal; `future` gets the READY snapshot or the reason."""
        if adapter.is_base:
            settle(future, self.catalogue.get(adapter))
            return
        record = self._records.require(adapter)
        if record.state is AdapterState.READY:
            settle(future, record.info)
            return
        record.loads.append(future)
        self._loads.start(record)

    def pin(self, adapter: AdapterId, future: Future[AdapterInfo], *, pinned: bool) -> None:
        """Load and keep, or let go; a pin whose load fails is none."""
        if adapter.is_base:
            raise InvalidRequest("adapter", "the base model is resident for good; it needs no pin")
        record = self._records.require(adapter)
        if not pinned:
            self._records.pinned.discard(adapter)
            self._records.change(record, pinned=False)
            settle(future, record.info)
            return
        self._records.pinned.add(adapter)
        if record.state is AdapterState.READY:
            self._records.change(record, pinned=True)
        self.load(adapter, future)

    def unload(self, adapter: AdapterId, future: Future[Unloaded]) -> None:
        """Free the adapter after the current step; one that is being loaded is unloaded once it is READY."""
        if adapter.is_base:
            raise InvalidRequest("adapter", "the base model is resident for good; it cannot be unloaded")
        record = self._records.require(adapter)
        if adapter in self._records.pinned:
            raise AdapterInUse(str(adapter), "is pinned; unpin it first")
        if record.state in (AdapterState.REGISTERED, AdapterState.FAILED):
            settle(future, Unloaded(record.info, 0))  # a load that waits for its turn came for those who want it
            return
        self._leave(record, future)
        if record.state is AdapterState.FETCHING and not record.origin.is_local:
            record.stop.set()  # a download may take long; what is on disk is read in no time

    def delete(self, adapter: AdapterId, future: Future[Unloaded], *, force: bool) -> None:
        """Forget a version; requests that are queued for a READY one are answered first, others fail.

        `force`: although it is pinned or has aliases, which go too. Raises AdapterInUse, AdapterNotFound.
        """
        if adapter.is_base:
            raise InvalidRequest("adapter", "the base model cannot be deleted")
        record = self._records.require(adapter)
        if not force:
            if adapter in self._records.pinned:
                raise AdapterInUse(str(adapter), "is pinned; unpin it first")
            self.catalogue.check_removable(adapter)
        record.deleting = True
        self._records.pinned.discard(adapter)
        gone = self.catalogue.remove(adapter)
        self._leave(record, future)
        self._loads.give_up(record)
        if record.examination is not None:
            settle(record.examination, AdapterNotFound(str(adapter)))
        for alias in gone:
            self._observers.on_alias_deleted(alias)
        self._observers.on_deleted(adapter)
        if record.state is not AdapterState.READY:
            self._on_failed(adapter, AdapterNotFound(str(adapter)))

    def set_alias(self, alias: Alias) -> Alias:
        """Publish an alias as it is given; raises AdapterNotFound for a version that is not there."""
        self.catalogue.put_alias(alias)
        self._observers.on_alias(alias)
        return alias

    def delete_alias(self, tenant: str, name: str, alias: str) -> Alias:
        """Raises AdapterNotFound, AliasNotFound, InvalidRequest."""
        gone = self.catalogue.alias(tenant, name, alias)
        self.catalogue.remove_alias(gone)
        self._observers.on_alias_deleted(gone)
        return gone

    def acquire(self, adapter: AdapterId) -> Resident:
        """Hold a READY adapter for a batch, until `release`; the base is always there."""
        if adapter.is_base:
            return self._base
        record = self._records[adapter]
        assert record.resident is not None, f"{adapter} is not READY"
        record.references += 1
        self._memory.device.used(adapter)
        return record.resident

    def release(self, adapter: AdapterId) -> None:
        if adapter.is_base:
            return
        record = self._records[adapter]
        assert record.references > 0, f"{adapter} is not held"
        record.references -= 1

    def handle(self, message: LoaderMessage) -> None:
        """Take what a loader thread has done."""
        if isinstance(message, CardRead):
            self._card_read(message)
        else:
            self._loads.handle(message)

    def settle(self, wanted: Callable[[], Mapping[AdapterId, float]]) -> None:
        """Between two steps: free what is to leave, and give waiting loads the room.

        `wanted` gives the adapters that have requests in the queue, with the time of the oldest.
        """
        if not self._leaving and self._loads.is_idle:
            self._loads.yielding = frozenset()
            return
        asked = wanted()
        for adapter in [*self._leaving]:
            self._try_to_leave(self._records[adapter], asked)
        self._loads.advance(asked)

    def stop(self, error: MultiloraError) -> None:
        """Fail everything that still waits for a load, an unload or a registration."""
        for _, future, _ in self._registering.values():
            settle(future, error)
        for record in self._records:
            record.stop.set()
            for load in (*record.loads, *record.reads):
                settle(load, error)
            if record.examination is not None:
                settle(record.examination, error)
            for unload in record.unloads:
                settle(unload, error)

    def check_integrity(self) -> None:
        """Raise AssertionError unless tiers, slots and records agree: no run, slot or reference without an owner."""
        self._memory.slots.check_integrity()
        for tier in {self._memory.device, self._memory.first}:
            tier.check_integrity()
            for adapter in tier.holders():
                assert adapter in self._records, f"{adapter} is forgotten and holds memory"
        for record in self._records:
            self._check(record)

    def _check(self, record: Record) -> None:
        adapter, state = record.info.id, record.state
        on_device = self._memory.device.run_of(adapter) is not None
        assert (record.resident is not None) == (state is AdapterState.READY), f"{adapter}: resident"
        assert record.references >= 0, f"{adapter} has {record.references} references"
        assert not record.references or record.resident is not None, f"{adapter} is held and not READY"
        if state in (AdapterState.READY, AdapterState.COPYING):
            assert on_device, f"{adapter} is {state} without a run"
        if state in (AdapterState.REGISTERED, AdapterState.FAILED):
            assert not on_device and self._memory.first.run_of(adapter) is None, f"{adapter} is {state} with a run"
            assert record.lease is None and record.fetched is None, f"{adapter} is {state} and holds files"

    def _want(self, record: Record) -> None:
        if record.state is AdapterState.FAILED and not self._loads.is_pending(record.info.id):
            assert record.info.failure is not None
            if record.retry_at is None or time.monotonic() < record.retry_at:
                raise AdapterFailed(str(record.info.id), record.info.failure)
        if record.state is not AdapterState.READY:
            self._loads.start(record)

    def _leave(self, record: Record, future: Future[Unloaded]) -> None:
        record.unloads.append(future)
        self._leaving[record.info.id] = None

    def _try_to_leave(self, record: Record, wanted: Mapping[AdapterId, float]) -> None:
        adapter = record.info.id
        is_asked = record.deleting and adapter in wanted and record.state is AdapterState.READY
        is_loading = self._loads.is_running(adapter) or (record.fetched is not None and not record.deleting)
        if record.references or is_asked or is_loading:
            return
        del self._leaving[adapter]
        freed = self._loads.evict(record) if record.state is AdapterState.READY else 0
        if record.state is AdapterState.HOST or record.deleting:
            self._loads.give_up(record)
        freed_host = self._loads.evict_from_host(record)
        if record.deleting:
            self._records.drop(record)
        unloads, record.unloads = record.unloads, []
        for future in unloads:
            settle(future, Unloaded(record.info, freed, freed_host))

    def _card_read(self, message: CardRead) -> None:
        card = message.outcome if isinstance(message.outcome, AdapterCard) else None
        error = message.outcome if isinstance(message.outcome, MultiloraError) else None
        if message.adapter in self._registering:
            self._registered(message.adapter, card, error)
            return
        record = self._records.find(message.adapter)
        if record is None:
            return
        asked, record.examination = record.examination, None
        idle = (AdapterState.REGISTERED,) if asked is None else (AdapterState.REGISTERED, AdapterState.FAILED)
        if record.state in idle and not self._loads.is_pending(message.adapter) and (asked or not record.info.is_read):
            if error is not None:
                self._loads.fail(record, error)
            else:
                self._records.move_or_change(record, AdapterState.REGISTERED, card=card, failure=None)
        if asked is not None:
            settle(asked, record.info)

    def _registered(self, adapter: AdapterId, card: AdapterCard | None, error: MultiloraError | None) -> None:
        origin, future, keep_failed = self._registering.pop(adapter)
        state = AdapterState.REGISTERED if error is None else AdapterState.FAILED
        info = AdapterInfo(adapter, origin.url, origin.path, state, card, failure=error)
        if error is None or keep_failed:
            self._records.add(Record(info, origin))
        if error is not None:
            settle(future, error)
        else:
            settle(future, info)

    def _changed(self, info: AdapterInfo) -> None:
        if info.state is AdapterState.READY:
            self._on_ready(info)
        self._observers.on_adapter(info)


def _base_card(base: BaseSpec) -> AdapterCard:
    """The base answers what needs no adapter's head."""
    pooling = Pooling.LAST if base.is_decoder else Pooling.MEAN
    return replace(
        BASE_CARD,
        pad_token_id=base.pad_token_id,
        base_model_name=base.name,
        pooling=pooling,
        num_token_ids=base.num_token_ids,
        second_task=Task.GENERATE if Task.GENERATE in base.heads else None,
    )


def _base_info(base: BaseSpec, resident: Resident) -> AdapterInfo:
    adapter = AdapterId(DEFAULT_TENANT, BASE_NAME, 1)
    return AdapterInfo(adapter, base.name, Path(), AdapterState.READY, _base_card(base), resident.digest)
