"""Which adapter is in which tier, and the moves between them. Owned by the engine thread.

A load is a conversation with the loader threads: fetch and validate (FETCHING → HOST), find room in the arena,
evicting idle adapters that were used longest ago (HOST → COPYING), write the image (COPYING → READY). Nothing points
to a run until its image is complete, so a half-written adapter cannot be used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.image import ImageLayout, extras_views, head_views
from lora_runtime.adapters.loader import AdapterLoader, CardRead, Fetched, LoaderMessage, LoadFailed, Written
from lora_runtime.arena import BASE_SLOT, RankArena, Run, SlotTable, align
from lora_runtime.batch import BASE_CARD, Extras, Resident
from lora_runtime.catalogue import Catalogue
from lora_runtime.errors import AdapterFailed, AdapterRejected, CapacityExceeded, InvalidRequest, MultiloraError
from lora_runtime.futures import settle
from lora_runtime.types import (
    BASE_NAME,
    DEFAULT_TENANT,
    AdapterCard,
    AdapterId,
    AdapterInfo,
    AdapterState,
    Pooling,
)

LEGAL_MOVES: Mapping[AdapterState, frozenset[AdapterState]] = {
    AdapterState.REGISTERED: frozenset({AdapterState.FETCHING}),
    AdapterState.FETCHING: frozenset({AdapterState.HOST, AdapterState.FAILED}),
    AdapterState.HOST: frozenset({AdapterState.COPYING, AdapterState.FAILED}),
    AdapterState.COPYING: frozenset({AdapterState.READY, AdapterState.FAILED}),
    AdapterState.READY: frozenset({AdapterState.DRAINING}),
    AdapterState.DRAINING: frozenset({AdapterState.REGISTERED}),
    AdapterState.FAILED: frozenset({AdapterState.FETCHING}),
}


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The adapter after an unload, and the bytes of the arena it gave back."""

    info: AdapterInfo
    freed_bytes: int


@dataclass(slots=True, eq=False)
class _Record:
    info: AdapterInfo
    fetched: Fetched | None = None
    run: Run | None = None
    resident: Resident | None = None
    references: int = 0
    used_at: float = 0.0
    load_started_at: float = 0.0
    loads: list[Future[AdapterInfo]] = field(default_factory=list[Future[AdapterInfo]])
    unloads: list[Future[Unloaded]] = field(default_factory=list[Future[Unloaded]])


class Residency:
    """Adapters by state. `on_change` is told of every new snapshot; `on_failed` of every load that was refused."""

    def __init__(
        self,
        base: BaseSpec,
        arena: RankArena,
        slots: SlotTable,
        loader: AdapterLoader,
        on_change: Callable[[AdapterInfo], None],
        on_failed: Callable[[AdapterId, MultiloraError], None],
    ) -> None:
        self._base = Resident(BASE_SLOT, base.fingerprint.weights_sha256, _base_card(base))
        self._shared_modules = base.shared_modules
        self.catalogue = Catalogue(_base_info(base, self._base))
        self._arena = arena
        self._slots = slots
        self._loader = loader
        self._on_change = on_change
        self._on_failed = on_failed
        self._records: dict[AdapterId, _Record] = {}
        self._registering: dict[AdapterId, tuple[Path, Future[AdapterInfo], bool]] = {}
        self._waiting_for_room: list[AdapterId] = []
        self._unloading: dict[AdapterId, None] = {}

    def register(self, adapter: AdapterId, path: Path, future: Future[AdapterInfo], *, keep_failed: bool) -> None:
        """Read the adapter's JSON files in a loader thread, then list it; see Engine.register."""
        if adapter.is_base:
            raise InvalidRequest("adapter", f"the name {BASE_NAME!r} is reserved for the base model")
        self.catalogue.check_free(adapter, self._registering)
        self._registering[adapter] = path, future, keep_failed
        self._loader.read_card(adapter, path)

    def is_ready(self, adapter: AdapterId) -> bool:
        if adapter.is_base:
            return True
        record = self._records.get(adapter)
        return record is not None and record.info.state is AdapterState.READY

    def want(self, adapter: AdapterId) -> None:
        """Start a load unless one is under way or done; raises AdapterFailed when the last one was refused."""
        if adapter.is_base:
            return
        record = self._record(adapter)
        if record.info.state is AdapterState.FAILED:
            assert record.info.failure is not None
            raise AdapterFailed(str(adapter), record.info.failure)
        if record.info.state is AdapterState.REGISTERED:
            self._start_load(record)

    def load(self, adapter: AdapterId, future: Future[AdapterInfo]) -> None:
        """Load, or try again after a refusal; `future` gets the READY snapshot or the reason."""
        if adapter.is_base:
            settle(future, self.catalogue.get(adapter))
            return
        record = self._record(adapter)
        if record.info.state is AdapterState.READY:
            settle(future, record.info)
            return
        record.loads.append(future)
        if record.info.state in (AdapterState.REGISTERED, AdapterState.FAILED):
            self._start_load(record)

    def unload(self, adapter: AdapterId, future: Future[Unloaded]) -> None:
        """Free the adapter after the current step; one that is loading is unloaded once loaded."""
        if adapter.is_base:
            raise InvalidRequest("adapter", "the base model is resident for good; it cannot be unloaded")
        record = self._record(adapter)
        if record.info.state in (AdapterState.REGISTERED, AdapterState.FAILED):
            settle(future, Unloaded(record.info, 0))
        else:
            record.unloads.append(future)
            self._unloading[adapter] = None

    def acquire(self, adapter: AdapterId) -> Resident:
        """Hold a READY adapter for a batch, until `release`; the base is always there."""
        if adapter.is_base:
            return self._base
        record = self._records[adapter]
        assert record.info.state is AdapterState.READY and record.resident is not None, f"{adapter} is not READY"
        record.references += 1
        record.used_at = time.monotonic()
        return record.resident

    def release(self, adapter: AdapterId) -> None:
        if adapter.is_base:
            return
        record = self._records[adapter]
        assert record.references > 0, f"{adapter} is not held"
        record.references -= 1

    def handle(self, message: LoaderMessage) -> None:
        """Take the next step of a load."""
        match message:
            case CardRead():
                self._registered(message)
            case Fetched():
                self._fetched(message)
            case Written(adapter):
                self._publish(self._records[adapter])
            case LoadFailed(adapter, error):
                self._fail(self._records[adapter], error)

    def settle(self) -> None:
        """Between two steps: free what was asked to be unloaded, and give waiting loads the room."""
        for record in [self._records[adapter] for adapter in self._unloading]:
            idle = record.info.state is AdapterState.READY and not record.references
            if idle or record.info.state in (AdapterState.REGISTERED, AdapterState.FAILED):
                freed = self._free(record) if idle else 0
                del self._unloading[record.info.id]
                unloads, record.unloads = record.unloads, []
                for future in unloads:
                    settle(future, Unloaded(record.info, freed))
        self._waiting_for_room = self._give_room(self._waiting_for_room)

    def stop(self, error: MultiloraError) -> None:
        """Fail everything that still waits for a load, an unload or a registration."""
        for _, future, _ in self._registering.values():
            settle(future, error)
        for record in self._records.values():
            for load in record.loads:
                settle(load, error)
            for unload in record.unloads:
                settle(unload, error)

    def check_integrity(self) -> None:
        """Raise AssertionError unless arena, slots and records agree: no run, slot or reference without an owner."""
        self._arena.check_integrity()
        self._slots.check_integrity()
        held = 0
        for adapter, record in self._records.items():
            loaded = record.info.state in (AdapterState.COPYING, AdapterState.READY, AdapterState.DRAINING)
            assert (record.run is not None) == loaded, f"{adapter} is {record.info.state} with run {record.run}"
            assert (record.resident is not None) == (record.info.state is AdapterState.READY), f"{adapter}: resident"
            assert record.references >= 0, f"{adapter} has {record.references} references"
            held += record.run.length if record.run else 0
        assert held * self._arena.buffer.itemsize == self._arena.used_bytes, "the arena holds bytes of nobody"

    def _record(self, adapter: AdapterId) -> _Record:
        self.catalogue.get(adapter)  # AdapterNotFound
        return self._records[adapter]

    def _registered(self, message: CardRead) -> None:
        path, future, keep_failed = self._registering.pop(message.adapter)
        card = message.outcome if isinstance(message.outcome, AdapterCard) else None
        error = message.outcome if isinstance(message.outcome, MultiloraError) else None
        state = AdapterState.REGISTERED if error is None else AdapterState.FAILED
        info = AdapterInfo(message.adapter, path, state, card, failure=error)
        if error is None or keep_failed:
            self._records[message.adapter] = _Record(info)
            self._publish_info(info)
        if error is not None:
            settle(future, error)
        else:
            settle(future, info)

    def _start_load(self, record: _Record) -> None:
        record.load_started_at = time.monotonic()
        # without a card nobody can be served: until its JSON files are read again, why not is still the answer
        failure = record.info.failure if record.info.card is None else None
        self._move(record, AdapterState.FETCHING, failure=failure)
        self._loader.fetch(record.info.id, record.info.path)

    def _fetched(self, message: Fetched) -> None:
        record = self._records[message.adapter]
        known, card, found = record.info.digest, record.info.card, message.checkpoint.card
        # requests that wait were matched and tokenised by the card that was registered
        other = card is not None and (card.task, card.tokenizer_sha256) != (found.task, found.tokenizer_sha256)
        if other or (known is not None and known != message.checkpoint.digest):
            changed = "its files changed since it was registered; a version is immutable, register a new one"
            self._fail(record, AdapterRejected("CHANGED", str(record.info.id), changed))
            return
        record.fetched = message
        self._move(record, AdapterState.HOST, card=message.checkpoint.card, failure=None)
        self._waiting_for_room.append(message.adapter)  # room is made after the step: what is READY gets its batch

    def _give_room(self, waiting: list[AdapterId]) -> list[AdapterId]:
        """Start the copies that fit, first come first; those that still wait.

        While a copy is under way, what it occupies is soon idle: nobody overtakes the first that waits for it, or
        small adapters could keep a large one out for ever.
        """
        still: list[AdapterId] = []
        for at, adapter in enumerate(waiting):
            if self._make_room(self._records[adapter]):
                continue
            still.append(adapter)
            if any(record.info.state is AdapterState.COPYING for record in self._records.values()):
                return still + waiting[at + 1 :]
        return still

    def _make_room(self, record: _Record) -> bool:
        """Start the copy of a HOST adapter, evicting idle ones; False when it has to wait for room."""
        assert record.fetched is not None
        needed = record.fetched.layout.num_elements
        if align(needed) > self._arena.buffer.numel():
            size = align(needed) * self._arena.buffer.itemsize
            message = f"needs {size} bytes, the whole arena has {self._arena.num_bytes}; give the arena more bytes"
            self._fail(record, CapacityExceeded(f"{record.info.id}: {message}", needed_bytes=size))
            return True
        while not self._arena.can_allocate(needed):
            idle = [r for r in self._records.values() if r.info.state is AdapterState.READY and not r.references]
            if not idle:
                return False
            self._free(min(idle, key=lambda r: r.used_at))
        record.run = self._arena.allocate(needed)
        self._move(record, AdapterState.COPYING)
        run = self._arena.view(record.run)
        self._loader.write(record.info.id, record.fetched.checkpoint, record.fetched.layout, run)
        return True

    def _publish(self, record: _Record) -> None:
        assert record.fetched is not None and record.run is not None
        checkpoint, layout = record.fetched.checkpoint, record.fetched.layout
        slot = self._slots.acquire()
        self._slots.publish(slot, record.run, layout.sites)
        run = self._arena.view(record.run)
        extras = {path: Extras(views.params, **views.tensors) for path, views in extras_views(layout, run).items()}
        changed = {*extras, *(weights.site.name for weights in checkpoint.sites)}
        record.resident = Resident(
            slot,
            checkpoint.digest,
            checkpoint.card,
            head_views(layout, run),
            extras,
            alone=not changed.isdisjoint(self._shared_modules),
        )
        record.used_at = time.monotonic()
        record.fetched = None  # the arena holds the only copy now
        self._move(
            record,
            AdapterState.READY,
            digest=checkpoint.digest,
            resident_bytes=record.run.length * self._arena.buffer.itemsize,
            num_parameters=checkpoint.num_parameters,
            ranks=_distinct_ranks(layout),
            load_seconds=time.monotonic() - record.load_started_at,
        )
        loads, record.loads = record.loads, []
        for future in loads:
            settle(future, record.info)

    def _free(self, record: _Record) -> int:
        """READY → DRAINING → REGISTERED; the bytes freed."""
        assert record.resident is not None and record.run is not None and not record.references
        self._move(record, AdapterState.DRAINING)
        freed = record.run.length * self._arena.buffer.itemsize
        self._slots.release(record.resident.slot)
        self._arena.free(record.run)
        record.resident = record.run = None
        self._move(record, AdapterState.REGISTERED, resident_bytes=0)
        return freed

    def _fail(self, record: _Record, error: MultiloraError) -> None:
        if record.run is not None:
            self._arena.free(record.run)
        record.run = record.fetched = None
        self._move(record, AdapterState.FAILED, failure=error, resident_bytes=0)
        loads, record.loads = record.loads, []
        for future in loads:
            settle(future, AdapterFailed(str(record.info.id), error))
        self._on_failed(record.info.id, error)

    def _move(self, record: _Record, state: AdapterState, **changes: object) -> None:
        assert state in LEGAL_MOVES[record.info.state], f"{record.info.id}: {record.info.state} → {state}"
        record.info = replace(record.info, state=state, **changes)  # pyright: ignore[reportArgumentType]
        self._publish_info(record.info)

    def _publish_info(self, info: AdapterInfo) -> None:
        self.catalogue.put(info)
        self._on_change(info)


def _distinct_ranks(layout: ImageLayout) -> tuple[int, ...]:
    return tuple(sorted({place.rank for place in layout.sites}))


def _base_card(base: BaseSpec) -> AdapterCard:
    """The base answers what needs no adapter's head."""
    pooling = Pooling.LAST if base.is_decoder else Pooling.MEAN
    return replace(
        BASE_CARD,
        pad_token_id=base.pad_token_id,
        base_model_name=base.name,
        pooling=pooling,
        num_token_ids=base.num_token_ids,
    )


def _base_info(base: BaseSpec, resident: Resident) -> AdapterInfo:
    adapter = AdapterId(DEFAULT_TENANT, BASE_NAME, 1)
    return AdapterInfo(adapter, Path(), AdapterState.READY, _base_card(base), resident.digest)
