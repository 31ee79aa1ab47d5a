"""Any order of registrations, loads, unloads, batches, pins, refusals and deletions: legal moves only, budgets hold,
no bytes lost, none freed in use, every question answered. With one tier, as on a CPU, and with two."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_runtime.adapters.checkpoint import Checkpoint, SiteWeights
from lora_runtime.adapters.image import ImageLayout, plan_image, write_image
from lora_runtime.adapters.loader import CardRead, Copied, Fetched, LoaderMessage, LoadFailed, LoadJob, Written
from lora_runtime.adapters.sources.api import Origin
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import Resident
from lora_runtime.errors import (
    AdapterAlreadyExists,
    AdapterFailed,
    AdapterInUse,
    AdapterNotFound,
    AdapterRejected,
    LoadCancelled,
    MultiloraError,
    SourceUnavailable,
)
from lora_runtime.observers import Observers
from lora_runtime.records import LEGAL_MOVES
from lora_runtime.residency import Residency
from lora_runtime.room import Memory
from lora_runtime.tiers import Tier
from lora_runtime.types import AdapterCard, AdapterId, AdapterInfo, AdapterState, Alias, ProblemType, Task
from tests.fakes import WIDTH, fake_spec

SPEC = fake_spec()
ADAPTERS = {
    AdapterId("default" if i % 3 else "small", f"a{i}", 1): rank for i, rank in enumerate((1, 4, 9, 16, 30, 40))
}
QUOTA = 4 * 560  # bytes that the tenant `small` may hold: either of its two adapters, not both
CARD = AdapterCard(Task.CLASSIFY, ("x",), ProblemType.SINGLE_LABEL, None, None, None)
URL_ADAPTERS = frozenset(sorted(ADAPTERS)[::2])  # their files come from a store


def checkpoint_of(adapter: AdapterId) -> Checkpoint:
    rank, number = ADAPTERS[adapter], float(int(adapter.name[1:]) + 1)
    weights = tuple(
        SiteWeights(site, np.full((rank, WIDTH), number, np.float32), np.full((WIDTH, rank), number, np.float32), 1.0)
        for site in SPEC.sites
    )
    return Checkpoint(CARD, f"digest-{adapter.name}", weights, {"classifier.bias": np.full(1, number, np.float32)}, {})


class FakeLease:
    """Counts what is held."""

    held = 0

    def __init__(self) -> None:
        FakeLease.held += 1
        self.path = Path("fetched")
        self.released = False

    def release(self) -> None:
        assert not self.released, "released twice"
        self.released = True
        FakeLease.held -= 1


class FakeLoader:
    """Does nothing by itself: the machine decides when a step ends, and how. A job gives its messages in order."""

    def __init__(self) -> None:
        self.jobs: list[tuple[AdapterId, Callable[[], list[LoaderMessage]]]] = []
        self.cancelled: dict[AdapterId, Callable[[], bool]] = {}

    def examine(self, adapter: AdapterId, folder: Path, *, urgent: bool) -> None:
        del folder, urgent
        self.jobs.append((adapter, lambda: [CardRead(adapter, CARD)]))

    def load(self, job: LoadJob) -> None:
        def load() -> list[LoaderMessage]:
            if job.stop.is_set():
                return [LoadFailed(job.adapter, LoadCancelled(str(job.adapter)))]
            checkpoint = checkpoint_of(job.adapter)
            layout = plan_image(checkpoint, SPEC.groups)
            if job.run is None:
                return [Fetched(job.adapter, checkpoint, layout, FakeLease(), writing=False)]
            job.run.fill_(float("nan"))
            write_image(checkpoint, layout, job.run)
            return [Fetched(job.adapter, checkpoint, layout, FakeLease(), writing=True), Written(job.adapter)]

        self.jobs.append((job.adapter, load))

    def write(self, adapter: AdapterId, checkpoint: Checkpoint, layout: ImageLayout, run: torch.Tensor) -> None:
        def write() -> list[LoaderMessage]:
            run.fill_(float("nan"))
            write_image(checkpoint, layout, run)
            return [Written(adapter)]

        self.jobs.append((adapter, write))

    def copy(self, adapter: AdapterId, image: torch.Tensor, run: torch.Tensor) -> None:
        def copy() -> list[LoaderMessage]:
            run.fill_(float("nan"))
            run[: image.numel()].copy_(image)
            return [Copied(adapter)]

        self.jobs.append((adapter, copy))


class ResidencyMachine(RuleBasedStateMachine):
    host_elements: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.arena = RankArena(4 * 1600)  # holds some of the adapters, never all
        self.host = None if self.host_elements is None else RankArena(4 * self.host_elements)
        self.slots = SlotTable(len(SPEC.sites), SPEC.groups, num_slots=1)
        self.loader: Any = FakeLoader()
        self.states: dict[AdapterId, AdapterState] = {}
        self.wanted: dict[AdapterId, float] = {}
        memory = Memory(Tier(self.arena), self.slots, None if self.host is None else Tier(self.host))
        observers = Observers()
        observers.add(self)  # pyright: ignore[reportArgumentType]
        self.residency = Residency(SPEC, memory, self.loader, observers, lambda _i: None, self.failed, self.quota_of)
        self.held: list[tuple[AdapterId, Resident]] = []
        self.futures: list[Future[Any]] = []
        FakeLease.held = 0
        for adapter in ADAPTERS:
            self.register(adapter, examine=True)
        while self.loader.jobs:
            self.end_job(0)

    def quota_of(self, tenant: str) -> int | None:
        return QUOTA if tenant == "small" else None

    # What the residency tells

    def on_adapter(self, info: AdapterInfo) -> None:
        before = self.states.get(info.id)
        if before is not None and before is not info.state:
            assert info.state in LEGAL_MOVES[before], f"{before} → {info.state}"
        self.states[info.id] = info.state
        assert (info.resident_bytes > 0) == (info.state in (AdapterState.READY, AdapterState.DRAINING))

    def on_deleted(self, adapter: AdapterId) -> None:
        del self.states[adapter]

    def on_alias(self, alias: Alias) -> None: ...

    def on_alias_deleted(self, alias: Alias) -> None: ...

    def failed(self, adapter: AdapterId, error: MultiloraError) -> None:
        assert error.message
        self.wanted.pop(adapter, None)  # the engine fails those who wait

    def end_job(self, at: int) -> None:
        _, job = self.loader.jobs.pop(at)
        for message in job():
            self.residency.handle(message)

    def ask(self, call: Callable[[Future[Any]], None], *refusals: type[MultiloraError]) -> None:
        future: Future[Any] = Future()
        try:
            call(future)
        except MultiloraError as error:
            assert isinstance(error, refusals), error  # noqa: PT017
            return
        self.futures.append(future)

    def known(self, adapter: AdapterId) -> bool:
        return adapter in self.states

    # What is asked of it

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)), examine=st.booleans())
    def register(self, adapter: AdapterId, examine: bool) -> None:
        origin = Origin("s3://bucket/a", "1") if adapter in URL_ADAPTERS else Origin("folder")
        self.ask(
            lambda future: self.residency.register(adapter, origin, future, examine=examine, keep_failed=False),
            AdapterAlreadyExists,
            AdapterInUse,
        )

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def load(self, adapter: AdapterId) -> None:
        self.ask(lambda future: self.residency.load(adapter, future), AdapterNotFound)

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def examine(self, adapter: AdapterId) -> None:
        self.ask(lambda future: self.residency.examine(adapter, future), AdapterNotFound)

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def prefetch(self, adapter: AdapterId) -> None:
        self.ask(lambda future: self.residency.prefetch(adapter, future), AdapterNotFound, AdapterFailed)

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def request_comes(self, adapter: AdapterId) -> None:
        try:
            self.residency.want(adapter)
        except AdapterFailed:
            assert self.states[adapter] is AdapterState.FAILED
        except AdapterNotFound:
            assert not self.known(adapter)
        else:
            self.wanted.setdefault(adapter, float(len(self.futures)))

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def unload(self, adapter: AdapterId) -> None:
        self.ask(lambda future: self.residency.unload(adapter, future), AdapterNotFound, AdapterInUse)

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)), pinned=st.booleans())
    def pin(self, adapter: AdapterId, pinned: bool) -> None:
        self.ask(lambda future: self.residency.pin(adapter, future, pinned=pinned), AdapterNotFound)

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)), force=st.booleans())
    def delete(self, adapter: AdapterId, force: bool) -> None:
        self.ask(lambda future: self.residency.delete(adapter, future, force=force), AdapterNotFound, AdapterInUse)
        if not self.known(adapter) and not self.residency.is_ready(adapter):
            assert adapter not in self.wanted, "those who wait for what is gone were not told"

    @precondition(lambda self: self.loader.jobs)
    @rule(data=st.data(), outcome=st.sampled_from(("done", "done", "refused", "out of reach")))
    def loader_ends_a_job(self, data: st.DataObject, outcome: str) -> None:
        at = data.draw(st.integers(0, len(self.loader.jobs) - 1))
        if outcome == "done":
            self.end_job(at)
            return
        adapter, job = self.loader.jobs.pop(at)
        refused: MultiloraError = AdapterRejected("TEST", "file", "was refused")
        if outcome == "out of reach":
            refused = SourceUnavailable("s3://bucket", "is out of reach", retry_after_s=0.0)
        messages = job()
        for message in messages:  # of a load, what came before still counts
            if isinstance(message, CardRead):
                self.residency.handle(CardRead(adapter, refused))
            elif isinstance(message, Fetched) and len(messages) > 1:
                self.residency.handle(message)
                continue
            else:
                if isinstance(message, Fetched):
                    message.lease.release()
                self.residency.handle(LoadFailed(adapter, refused))
            break

    @precondition(lambda self: any(self.residency.is_ready(a) for a in ADAPTERS))
    @rule(data=st.data())
    def batch_starts(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from([a for a in ADAPTERS if self.residency.is_ready(a)]))
        self.held.append((adapter, self.residency.acquire(adapter)))
        self.wanted.pop(adapter, None)

    @precondition(lambda self: self.held)
    @rule()
    def batch_ends(self) -> None:
        adapter, _ = self.held.pop(0)
        self.residency.release(adapter)

    @rule()
    def between_steps(self) -> None:
        self.residency.settle(lambda: self.wanted)

    @invariant()
    def whole(self) -> None:
        self.residency.check_integrity()
        assert self.arena.used_bytes <= self.arena.num_bytes
        published = sum(info.resident_bytes for info in self.residency.catalogue.all())
        assert published <= self.arena.used_bytes
        assert sum(i.resident_bytes for i in self.residency.catalogue.list("small")) <= QUOTA

    @invariant()
    def what_a_batch_holds_is_untouched(self) -> None:
        for adapter, resident in self.held:
            number = float(int(adapter.name[1:]) + 1)
            a_offset, _, rank, _ = self.slots.entry(resident.slot, 0)
            assert rank == ADAPTERS[adapter]
            assert torch.all(self.arena.buffer[a_offset : a_offset + rank * WIDTH] == number)
            assert float(resident.params["classifier.bias"]) == number
            assert resident.digest == f"digest-{adapter.name}"

    def teardown(self) -> None:
        while self.held:
            self.batch_ends()
        self.run_to_the_end()
        assert all(future.done() for future in self.futures), "a call was never answered"
        for future in self.futures:
            assert future.exception() is None or isinstance(future.exception(), MultiloraError)
        for adapter in [*self.states]:
            self.pin(adapter, pinned=False)
            self.unload(adapter)
        self.run_to_the_end()
        self.residency.check_integrity()
        assert self.arena.used_bytes == 0, "everything was unloaded and bytes are left"
        assert self.host is None or self.host.used_bytes == 0
        assert FakeLease.held == 0, "files are held for nobody"

    def run_to_the_end(self) -> None:
        self.wanted.clear()
        for _ in range(300):
            self.residency.settle(lambda: self.wanted)
            if self.loader.jobs:
                self.end_job(0)
        self.residency.settle(lambda: self.wanted)


class TwoTierMachine(ResidencyMachine):
    host_elements = 2600


def test_small_adapters_overtake_a_large_one_that_waits_for_room_but_not_for_ever() -> None:
    machine = ResidencyMachine()
    small, large = AdapterId("default", "a1", 1), AdapterId("default", "a5", 1)

    def load(adapter: AdapterId) -> None:
        machine.load(adapter)
        for _ in range(4):
            machine.between_steps()
            while machine.loader.jobs:
                machine.end_job(0)

    load(AdapterId("default", "a4", 1))
    holder = machine.residency.acquire(AdapterId("default", "a4", 1))  # in use: the large one finds no room
    load(large)
    assert machine.states[large] is AdapterState.REGISTERED, "it waits by its size, and holds nothing"
    overtaken = 0
    for _ in range(20):
        load(small)
        if machine.states[small] is not AdapterState.READY:
            break
        overtaken += 1
        machine.unload(small)
        machine.between_steps()
    assert 1 <= overtaken < 20, f"it was overtaken {overtaken} times"
    assert holder.digest == "digest-a4"
    machine.residency.release(AdapterId("default", "a4", 1))
    for _ in range(4):
        machine.between_steps()
        while machine.loader.jobs:
            machine.end_job(0)
    assert machine.states[large] is AdapterState.READY
    machine.teardown()


TestOneTier = ResidencyMachine.TestCase
TestOneTier.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestTwoTiers = TwoTierMachine.TestCase
TestTwoTiers.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
