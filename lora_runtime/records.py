"""What the engine keeps of each adapter, and the one table of moves between states."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from lora_runtime.adapters.image import ImageLayout
from lora_runtime.adapters.loader import Fetched, Lease
from lora_runtime.adapters.sources.api import Origin
from lora_runtime.batch import Resident
from lora_runtime.catalogue import Catalogue
from lora_runtime.futures import settle
from lora_runtime.types import AdapterId, AdapterInfo, AdapterState, Alias, Unloaded

LEGAL_MOVES: Mapping[AdapterState, frozenset[AdapterState]] = {
    AdapterState.REGISTERED: frozenset({AdapterState.FETCHING, AdapterState.FAILED}),
    AdapterState.FETCHING: frozenset({AdapterState.HOST, AdapterState.FAILED, AdapterState.REGISTERED}),
    AdapterState.HOST: frozenset({AdapterState.COPYING, AdapterState.FAILED, AdapterState.REGISTERED}),
    AdapterState.COPYING: frozenset({AdapterState.READY, AdapterState.FAILED}),
    AdapterState.READY: frozenset({AdapterState.DRAINING}),
    AdapterState.DRAINING: frozenset({AdapterState.REGISTERED, AdapterState.HOST}),
    AdapterState.FAILED: frozenset({AdapterState.FETCHING, AdapterState.FAILED, AdapterState.REGISTERED}),
}


@dataclass(slots=True, eq=False)
class Record:
    """One adapter version. `layout` outlives the image: the next load knows its size."""

    info: AdapterInfo
    origin: Origin
    fetched: Fetched | None = None  # read, and not written yet
    lease: Lease | None = None  # on its files, while anything of it is in memory
    layout: ImageLayout | None = None
    resident: Resident | None = None
    references: int = 0  # batches
    deleting: bool = False
    stop: threading.Event = field(default_factory=threading.Event)  # of the load under way
    load_started_at: float = 0.0
    retry_at: float | None = None  # monotonic seconds; of a failure whose cause may pass
    examination: Future[AdapterInfo] | None = None  # asked for by name
    overtaken: int = 0  # times that another got the room it waits for
    reads: list[Future[AdapterInfo]] = field(default_factory=list[Future[AdapterInfo]])
    loads: list[Future[AdapterInfo]] = field(default_factory=list[Future[AdapterInfo]])
    unloads: list[Future[Unloaded]] = field(default_factory=list[Future[Unloaded]])

    @property
    def state(self) -> AdapterState:
        return self.info.state

    def settle_loads(self) -> None:
        """Those who waited for the adapter to be READY, or for its card."""
        loads, self.loads = self.loads, []
        for future in loads:
            settle(future, self.info)
        self.settle_reads()

    def settle_reads(self) -> None:
        reads, self.reads = self.reads, []
        for future in reads:
            settle(future, self.info)


class Records:
    """All records, and the only way to change what others see of them."""

    def __init__(
        self,
        catalogue: Catalogue,
        on_change: Callable[[AdapterInfo], None],
        on_alias: Callable[[Alias], None],
    ) -> None:
        self.catalogue = catalogue
        self._on_change = on_change
        self._on_alias = on_alias
        self._records: dict[AdapterId, Record] = {}
        self.pinned: set[AdapterId] = set()  # asked to stay on the device; the snapshot says so once it is READY

    def __getitem__(self, adapter: AdapterId) -> Record:
        return self._records[adapter]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __contains__(self, adapter: AdapterId) -> bool:
        return adapter in self._records

    def find(self, adapter: AdapterId) -> Record | None:
        return self._records.get(adapter)

    def require(self, adapter: AdapterId) -> Record:
        """Raises AdapterNotFound, also for one that is being deleted."""
        self.catalogue.get(adapter)
        return self._records[adapter]

    def add(self, record: Record) -> None:
        self._records[record.info.id] = record
        self._tell(record.info)

    def drop(self, record: Record) -> None:
        """Forget a record whose adapter the catalogue has forgotten."""
        self.pinned.discard(record.info.id)
        del self._records[record.info.id]

    def move(self, record: Record, state: AdapterState, **changes: object) -> None:
        """To another state, with the other changes of the snapshot."""
        assert state in LEGAL_MOVES[record.state], f"{record.info.id}: {record.state} → {state}"
        self.change(record, state=state, **changes)

    def move_or_change(self, record: Record, state: AdapterState, **changes: object) -> None:
        """As `move`, where it may be in that state already."""
        if record.state is state:
            self.change(record, **changes)
        else:
            self.move(record, state, **changes)

    def change(self, record: Record, **changes: object) -> None:
        """Publish a changed snapshot."""
        record.info = replace(record.info, **changes)  # pyright: ignore[reportArgumentType]
        if not record.deleting:
            self._tell(record.info)

    def _tell(self, info: AdapterInfo) -> None:
        alias = self.catalogue.put(info)
        self._on_change(info)
        if alias is not None:
            self._on_alias(alias)
