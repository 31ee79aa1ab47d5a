"""The conversation with the loader threads that brings an adapter from its files to READY. Owned by the engine thread.

With one tier (a CPU) the image is written into its run of the arena. With two it is written into host memory and copied
to the arena from there, and stays in both. An adapter that waits for room holds nothing outside the budgets: one whose
size is known waits before its files are read, and one that was read and found no room is read again later.

Nothing points to a run until its image is complete, so a half-written adapter cannot be used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import torch

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.image import extras_views, head_views
from lora_runtime.adapters.loader import (
    AdapterLoader,
    Copied,
    Expected,
    Fetched,
    LoaderMessage,
    LoadFailed,
    LoadJob,
    Written,
)
from lora_runtime.batch import Extras, Resident
from lora_runtime.errors import AdapterFailed, CapacityExceeded, LoadCancelled, MultiloraError
from lora_runtime.futures import settle
from lora_runtime.records import Record, Records
from lora_runtime.room import Memory, Room, Wait
from lora_runtime.tiers import Tier
from lora_runtime.types import AdapterId, AdapterState

_MAX_RUNNING = 8  # loads whose files are being fetched or read: what they hold beside the budgets is bounded
_PATIENCE_S = 0.25  # that a load waits for adapters to fall idle before some begin no more sequences
_MAX_OVERTAKEN = 8  # times that others may get room before the one that waits for it
_MAX_BLOCKED = 8  # loads without room that are looked at between two steps


class Loads:
    """Loads that wait for their turn or for room, and those under way.

    `on_failed` is told of every one refused, `on_evicted` of every image that made room in a tier.
    """

    def __init__(
        self,
        records: Records,
        memory: Memory,
        loader: AdapterLoader,
        base: BaseSpec,
        on_failed: Callable[[AdapterId, MultiloraError], None],
        on_evicted: Callable[[AdapterId, str], None],
        quota_of: Callable[[str], int | None],
    ) -> None:
        self._records = records
        self._memory = memory
        self._loader = loader
        self._shared_modules = base.shared_modules
        self._shared_sites = frozenset(site.index for site in base.sites if site.name in base.shared_modules)
        self._on_failed = on_failed
        self._on_evicted = on_evicted
        self.yielding: frozenset[AdapterId] = frozenset()  # in use, and wanted out of the way by a load that waits
        self._queue: dict[AdapterId, float] = {}  # since when it waits for its next step, in that order
        self._running: set[AdapterId] = set()  # the loader owes a message
        self._room = Room(
            records,
            memory,
            evict=self._make_way,
            evict_from_host=self._make_way_on_host,
            moved=self._moved,
            is_pending=self.is_pending,
            quota_of=quota_of,
        )

    def start(self, record: Record) -> None:
        """Queue a load, unless it is queued or under way."""
        adapter = record.info.id
        if adapter not in self._queue and adapter not in self._running:
            record.load_started_at = self._queue[adapter] = time.monotonic()
            record.overtaken = 0
            record.stop = threading.Event()
            self._hurry(record)

    def is_pending(self, adapter: AdapterId) -> bool:
        return adapter in self._queue or adapter in self._running

    def is_running(self, adapter: AdapterId) -> bool:
        return adapter in self._running

    @property
    def is_idle(self) -> bool:
        """Whether no load waits for a step that `advance` may take."""
        return not self._queue

    def give_up(self, record: Record) -> None:
        """Take a load out of the queue; one under way goes on, unless its files are still being fetched."""
        record.stop.set()
        if self._queue.pop(record.info.id, None) is not None:
            self._unstage(record)
            self._refuse_waiting(record, LoadCancelled(str(record.info.id)))

    def handle(self, message: LoaderMessage) -> None:
        """Take what a loader thread has done."""
        record = self._records[message.adapter]
        match message:
            case Fetched():
                self._fetched(record, message)
            case Written():
                self._written(record)
            case Copied():
                self._running.discard(message.adapter)
                self._publish(record)
            case LoadFailed(adapter, error):
                self._running.discard(adapter)
                self.fail(record, error)
            case _:
                raise AssertionError(f"{message} is no step of a load")

    def advance(self, wanted: Mapping[AdapterId, float]) -> None:
        """Between two steps: start what may start, and give room, first come first.

        `wanted` are adapters with requests in the queue, with the time of the oldest: a READY one is not evicted for a
        load that began to wait later. A load that finds no room is overtaken by those that do, a bounded number of
        times, so that small adapters cannot keep a large one out.
        """
        self.yielding = frozenset()
        blocked: list[Record] = []
        full: set[str] = set()  # tenants at their quota: what waits for its own tenant holds up nobody else
        for adapter, since in sorted(self._queue.items(), key=lambda item: item[1]):
            if len(self._running) >= _MAX_RUNNING or len(blocked) >= _MAX_BLOCKED:
                break
            if adapter.tenant in full:
                continue
            record = self._records[adapter]
            if self._take_step(record, since, wanted):
                for other in blocked:
                    other.overtaken += 1
            elif self._room.is_over_quota(record):
                full.add(adapter.tenant)
            else:
                if not blocked and record.layout is not None and time.monotonic() - since > _PATIENCE_S:
                    wait = Wait(record, record.layout.num_elements, since, wanted)
                    self.yielding = self._room.busy_victims(wait)
                blocked.append(record)
                if record.overtaken >= _MAX_OVERTAKEN:
                    break

    def fail(self, record: Record, error: MultiloraError) -> None:
        """Free what the load holds; a cancelled one is as if it had never begun."""
        for tier in {self._memory.first, self._memory.device}:
            tier.free(record.info.id)
        self._let_go(record)
        if isinstance(error, LoadCancelled):
            self._records.move(record, AdapterState.REGISTERED, resident_bytes=0, host_bytes=0, path=record.origin.path)
            self._refuse_waiting(record, error)
            return
        record.retry_at = None if error.retry_after_s is None else time.monotonic() + error.retry_after_s
        self._records.pinned.discard(record.info.id)
        changes = {"failure": error, "resident_bytes": 0, "host_bytes": 0, "path": record.origin.path, "pinned": False}
        self._records.move(record, AdapterState.FAILED, **changes)
        self._refuse_waiting(record, AdapterFailed(str(record.info.id), error))
        self._on_failed(record.info.id, error)

    def evict(self, record: Record) -> int:
        """Take a READY adapter out of the device; the bytes freed. What the host holds of it stays."""
        adapter = record.info.id
        assert record.resident is not None and not record.references, f"{adapter} is in use"
        self._records.move(record, AdapterState.DRAINING)
        self._memory.slots.release(record.resident.slot)
        record.resident = None
        freed = self._memory.device.free(adapter)
        if self._memory.host is not None and self._memory.host.run_of(adapter) is not None:
            self._records.move(record, AdapterState.HOST, resident_bytes=0)
        else:
            self._leave_memory(record)
        return freed

    def evict_from_host(self, record: Record) -> int:
        """Free what host memory holds of an adapter that no load is working on; the bytes."""
        if self._memory.host is None:
            return 0
        freed = self._memory.host.free(record.info.id)
        if record.state is AdapterState.HOST:
            self._leave_memory(record)
        elif freed:
            self._records.change(record, host_bytes=0)
        return freed

    def _make_way(self, record: Record) -> None:
        self.evict(record)
        self._on_evicted(record.info.id, "device")

    def _make_way_on_host(self, record: Record) -> None:
        self.evict_from_host(record)
        self._on_evicted(record.info.id, "host")

    def _leave_memory(self, record: Record) -> None:
        self._let_go(record)
        path = record.origin.path
        self._records.move(record, AdapterState.REGISTERED, resident_bytes=0, host_bytes=0, path=path)

    def _let_go(self, record: Record) -> None:
        record.fetched = None
        if record.lease is not None:
            record.lease.release()
            record.lease = None

    def _refuse_waiting(self, record: Record, error: MultiloraError) -> None:
        waiting, record.loads, record.reads = [*record.loads, *record.reads], [], []
        for future in waiting:
            settle(future, error)

    def _unstage(self, record: Record) -> None:
        """Drop what was read of an adapter that cannot be written yet."""
        if record.fetched is not None:
            self._leave_memory(record)

    def _hurry(self, record: Record) -> None:
        """Take a step at once, not after the next batch, where that needs nobody's room and is nobody else's turn."""
        fetched, layout = record.fetched, record.layout
        size = fetched.layout.num_elements if fetched else layout.num_elements if layout else 0
        alone = len(self._queue) == 1 and len(self._running) < _MAX_RUNNING
        is_host = record.state is AdapterState.HOST and fetched is None
        if alone and self._room.is_free(record, size, on_device=is_host or self._memory.host is None):
            self._take_step(record, self._queue[record.info.id], {})

    def _take_step(self, record: Record, since: float, wanted: Mapping[AdapterId, float]) -> bool:
        """The next step of a queued load; False when it has to wait for room."""
        if record.state is AdapterState.HOST and record.fetched is None:
            return self._copy(record, since, wanted)
        return self._begin(record, since, wanted) if record.fetched is None else self._write(record, since, wanted)

    def _begin(self, record: Record, since: float, wanted: Mapping[AdapterId, float]) -> bool:
        adapter, run = record.info.id, None
        if record.layout is not None:
            if not self._make_room(self._room.first, Wait(record, record.layout.num_elements, since, wanted)):
                return adapter not in self._queue  # refused for good, or still waiting
            run = self._view(self._memory.first, adapter)
        self._run(adapter)
        # without a card nobody can be served: until its JSON files are read again, why not is still the answer
        failure = record.info.failure if record.info.card is None else None
        self._records.move(record, AdapterState.FETCHING, failure=failure)
        expected = Expected(record.info.digest, record.info.card)
        self._loader.load(LoadJob(adapter, record.origin, expected, run, record.stop))
        return True

    def _fetched(self, record: Record, message: Fetched) -> None:
        adapter = message.adapter
        record.layout, record.lease = message.layout, message.lease
        facts = {"card": message.checkpoint.card, "failure": None, "path": message.lease.path}
        facts |= {"digest": message.checkpoint.digest, "num_parameters": message.checkpoint.num_parameters}
        facts |= {"ranks": tuple(sorted({place.rank for place in message.layout.sites}))}
        if self._memory.host is None:
            self._records.move(record, AdapterState.HOST, **facts)
            if message.writing:
                self._records.move(record, AdapterState.COPYING)
        else:
            self._records.change(record, **facts)
        if not message.writing:
            self._memory.first.free(adapter)  # a run of another size, if any
            record.fetched = message
            self._running.discard(adapter)
            self._queue[adapter] = record.load_started_at
            self._hurry(record)
        record.settle_reads()

    def _write(self, record: Record, since: float, wanted: Mapping[AdapterId, float]) -> bool:
        """Write what was read. Without room it is dropped, and waits by its size, which is known now."""
        fetched = record.fetched
        assert fetched is not None
        if not self._make_room(self._room.first, Wait(record, fetched.layout.num_elements, since, wanted)):
            if record.info.id in self._queue:
                self._unstage(record)
                return False
            return True
        self._run(record.info.id)
        if self._memory.host is None:
            self._records.move(record, AdapterState.COPYING)
        run = self._view(self._memory.first, record.info.id)
        self._loader.write(record.info.id, fetched.checkpoint, fetched.layout, run)
        record.fetched = None
        return True

    def _written(self, record: Record) -> None:
        adapter = record.info.id
        self._running.discard(adapter)
        seconds = time.monotonic() - record.load_started_at
        if self._memory.host is None:
            self._publish(record)
            return
        self._memory.host.used(adapter, seconds)
        self._records.move(record, AdapterState.HOST, host_bytes=self._memory.host.bytes_of(adapter))
        self._queue[adapter] = record.load_started_at
        self._hurry(record)

    def _copy(self, record: Record, since: float, wanted: Mapping[AdapterId, float]) -> bool:
        assert record.layout is not None and self._memory.host is not None
        adapter, size = record.info.id, record.layout.num_elements
        if not self._make_room(self._room.on_device, Wait(record, size, since, wanted)):
            return adapter not in self._queue
        self._run(adapter)
        self._records.move(record, AdapterState.COPYING)
        self._loader.copy(adapter, self._view(self._memory.host, adapter), self._view(self._memory.device, adapter))
        return True

    def _publish(self, record: Record) -> None:
        adapter, device = record.info.id, self._memory.device
        run, layout = device.run_of(adapter), record.layout
        assert run is not None and layout is not None
        seconds = time.monotonic() - record.load_started_at
        device.used(adapter, seconds)
        slot = self._memory.slots.acquire()
        self._memory.slots.publish(slot, run, layout.sites)
        record.resident = self._resident(record, slot)
        record.fetched = None
        changes = {
            "resident_bytes": device.bytes_of(adapter),
            "load_seconds": seconds,
            "pinned": adapter in self._records.pinned,
        }
        self._records.move(record, AdapterState.READY, **changes)
        record.settle_loads()

    def _resident(self, record: Record, slot: int) -> Resident:
        layout, info = record.layout, record.info
        assert layout is not None and info.card is not None and info.digest is not None
        run = self._view(self._memory.device, info.id)
        extras = {path: Extras(views.params, **views.tensors) for path, views in extras_views(layout, run).items()}
        alone = bool(self._shared_modules & extras.keys()) or any(p.site in self._shared_sites for p in layout.sites)
        return Resident(slot, info.digest, info.card, head_views(layout, run), extras, alone=alone)

    def _run(self, adapter: AdapterId) -> None:
        del self._queue[adapter]
        self._running.add(adapter)

    def _view(self, tier: Tier, adapter: AdapterId) -> torch.Tensor:
        run = tier.run_of(adapter)
        assert run is not None, f"{adapter} has no run"
        return tier.arena.view(run)

    def _make_room(self, make: Callable[[Wait], bool], wait: Wait) -> bool:
        """Whether there is room; without it the load waits, or has left the queue because it can never fit."""
        try:
            return make(wait)
        except CapacityExceeded as error:
            self._queue.pop(wait.record.info.id)
            self.fail(wait.record, error)
            return False

    def _moved(self, adapter: AdapterId) -> None:
        """An image has another place in the arena: point to it before the next step."""
        record = self._records[adapter]
        run = self._memory.device.run_of(adapter)
        assert record.resident is not None and run is not None
        self._memory.slots.move(record.resident.slot, run)
        record.resident = self._resident(record, record.resident.slot)
