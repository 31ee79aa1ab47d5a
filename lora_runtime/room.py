"""Room for an image: whose images may go for it, in which tier, and when there can never be any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lora_runtime.arena import SlotTable
from lora_runtime.errors import CapacityExceeded
from lora_runtime.records import Record, Records
from lora_runtime.tiers import Tier
from lora_runtime.types import AdapterId, AdapterState

_USUAL_LOAD_S = 0.01  # until it is measured


@dataclass(frozen=True, slots=True)
class Memory:
    """The tiers; `host` None: the device's images are host memory."""

    device: Tier
    slots: SlotTable
    host: Tier | None = None

    @property
    def first(self) -> Tier:
        """Where images are written."""
        return self.host or self.device


@dataclass(frozen=True, slots=True)
class Wait:
    """Whose room it is, since when it waits, and the adapters that have requests in the queue, since when."""

    record: Record
    size: int  # elements
    since: float  # monotonic seconds
    wanted: Mapping[AdapterId, float]


class Room:
    """Makes room between two steps. What it evicts or moves, it tells its owner."""

    def __init__(
        self,
        records: Records,
        memory: Memory,
        *,
        evict: Callable[[Record], object],
        evict_from_host: Callable[[Record], object],
        moved: Callable[[AdapterId], None],
        is_pending: Callable[[AdapterId], bool],
        quota_of: Callable[[str], int | None],
    ) -> None:
        """`quota_of` gives the bytes of the device that a tenant's adapters may hold, None for no bound."""
        self._records = records
        self._memory = memory
        self._evict = evict
        self._evict_from_host = evict_from_host
        self._moved = moved
        self._is_pending = is_pending
        self._quota_of = quota_of

    def on_device(self, wait: Wait) -> bool:
        """Whether the adapter got a run of the device; raises CapacityExceeded when it can never have one."""
        device, record = self._memory.device, wait.record
        pinned = self._records.pinned - {record.info.id}
        if not device.can_ever_fit(wait.size, pinned):
            raise _too_large(record, device, wait.size, bool(pinned))
        if not self._within_quota(wait):
            return False
        return device.allocate(
            record.info.id,
            wait.size,
            record.info.load_seconds or _USUAL_LOAD_S,
            idle=self._idle_on_device,
            may_go=lambda adapter: self._may_go(adapter, wait),
            evict=lambda adapter: self._evict(self._records[adapter]),
            moved=self._moved,
        )

    def on_host(self, wait: Wait) -> bool:
        """Whether the adapter got a run of host memory; raises CapacityExceeded when it can never have one."""
        host, record = self._memory.host, wait.record
        assert host is not None
        if not host.can_ever_fit(wait.size, ()):
            raise _too_large(record, host, wait.size, pinned=False)
        return host.allocate(
            record.info.id,
            wait.size,
            record.info.load_seconds or _USUAL_LOAD_S,
            idle=self._idle_on_host,
            may_go=lambda _adapter: True,
            evict=lambda adapter: self._evict_from_host(self._records[adapter]),
            moved=lambda _adapter: None,
        )

    def busy_victims(self, wait: Wait) -> frozenset[AdapterId]:
        """Adapters of the device in use whose going would give the room: the least worth keeping, as few as do."""
        device = self._memory.device
        missing = device.bytes_for(wait.size) - device.arena.free_elements * device.arena.buffer.itemsize
        busy = (self._records[adapter] for adapter in device.holders())
        able = [r.info.id for r in busy if r.references and self._may_go(r.info.id, wait)]
        victims: list[AdapterId] = []
        for adapter in sorted(able, key=device.worth):
            if missing <= 0 and victims:
                break
            victims.append(adapter)
            missing -= device.bytes_of(adapter)
        return frozenset(victims)

    def first(self, wait: Wait) -> bool:
        """As `on_host` or `on_device`, in the tier where images are written."""
        return self.on_device(wait) if self._memory.host is None else self.on_host(wait)

    def is_free(self, record: Record, size: int, *, on_device: bool) -> bool:
        """Whether there is a run for `size` elements (0: none is needed yet) that is nobody's, and no quota to heed."""
        tier = self._memory.device if on_device else self._memory.first
        return not size or (tier.arena.can_allocate(size) and self._quota_of(record.info.id.tenant) is None)

    def _within_quota(self, wait: Wait) -> bool:
        """Whether the tenant's other adapters leave it the room; its own idle ones go for that."""
        device, tenant = self._memory.device, wait.record.info.id.tenant
        quota = self._quota_of(tenant)
        if quota is None:
            return True
        needed = device.bytes_for(wait.size)
        own = [adapter for adapter in device.holders() if adapter.tenant == tenant]
        kept = sum(device.bytes_of(adapter) for adapter in own if adapter in self._records.pinned)
        if needed > quota - kept:
            pins = f" and {kept} of it are pinned; unpin some, or" if kept else ";"
            message = f"needs {needed} bytes, max_resident_mib of its tenant allows {quota}{pins} raise that limit"
            raise CapacityExceeded(f"{wait.record.info.id}: {message}", needed_bytes=needed, retry_after_s=10.0)
        excess = sum(device.bytes_of(adapter) for adapter in own) + needed - quota
        idle = {*self._idle_on_device()}
        may_go = [adapter for adapter in own if adapter in idle and self._may_go(adapter, wait)]
        if sum(device.bytes_of(adapter) for adapter in may_go) < excess:
            return False
        for adapter in sorted(may_go, key=device.worth):
            if excess <= 0:
                break
            excess -= device.bytes_of(adapter)
            self._evict(self._records[adapter])
        return True

    def is_over_quota(self, record: Record) -> bool:
        """Whether it is its own tenant's adapters that leave it no room."""
        device, tenant = self._memory.device, record.info.id.tenant
        quota = self._quota_of(tenant)
        if quota is None or record.layout is None:
            return False
        held = sum(device.bytes_of(adapter) for adapter in device.holders() if adapter.tenant == tenant)
        return held + device.bytes_for(record.layout.num_elements) > quota

    def _idle_on_device(self) -> list[AdapterId]:
        holders = (self._records[adapter] for adapter in self._memory.device.holders())
        return [record.info.id for record in holders if record.resident is not None and not record.references]

    def _may_go(self, adapter: AdapterId, wait: Wait) -> bool:
        """Whether an idle adapter may be evicted: not for a load that began to wait after its own requests."""
        return adapter not in self._records.pinned and wait.wanted.get(adapter, wait.since) >= wait.since

    def _idle_on_host(self) -> list[AdapterId]:
        assert self._memory.host is not None
        settled = (AdapterState.READY, AdapterState.HOST)
        holders = (self._records[adapter] for adapter in self._memory.host.holders())
        return [r.info.id for r in holders if r.state in settled and not self._is_pending(r.info.id)]


def _too_large(record: Record, tier: Tier, size: int, pinned: bool) -> CapacityExceeded:
    needed = tier.bytes_for(size)
    has = f"the whole arena has {tier.arena.num_bytes}"
    if pinned and needed <= tier.arena.num_bytes:
        message = f"needs {needed} bytes, {has} and pinned adapters leave less; unpin some or give the arena more bytes"
    else:
        message = f"needs {needed} bytes, {has}; give the arena more bytes"
    return CapacityExceeded(f"{record.info.id}: {message}", needed_bytes=needed, retry_after_s=10.0)
