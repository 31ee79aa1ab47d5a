"""Any order of loads, unloads, batches and refusals: legal moves only, no bytes lost, none freed in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_runtime.adapters.checkpoint import Checkpoint, SiteWeights
from lora_runtime.adapters.image import ImageLayout, plan_image, write_image
from lora_runtime.adapters.loader import CardRead, Fetched, LoaderMessage, LoadFailed, Written
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import Resident
from lora_runtime.errors import AdapterFailed, AdapterRejected, MultiloraError
from lora_runtime.residency import LEGAL_MOVES, Residency, Unloaded
from lora_runtime.types import AdapterCard, AdapterId, AdapterInfo, AdapterState, ProblemType, Task
from tests.fakes import WIDTH, fake_spec

SPEC = fake_spec()
ADAPTERS = {AdapterId("default", f"a{i}", 1): rank for i, rank in enumerate((1, 4, 9, 16, 30))}
CARD = AdapterCard(Task.CLASSIFY, ("x",), ProblemType.SINGLE_LABEL, None, None, None)


def checkpoint_of(adapter: AdapterId) -> Checkpoint:
    rank, number = ADAPTERS[adapter], float(int(adapter.name[1:]) + 1)
    weights = tuple(
        SiteWeights(site, np.full((rank, WIDTH), number, np.float32), np.full((WIDTH, rank), number, np.float32), 1.0)
        for site in SPEC.sites
    )
    return Checkpoint(CARD, f"digest-{adapter.name}", weights, {"classifier.bias": np.full(1, number, np.float32)}, {})


class FakeLoader:
    """Does nothing by itself: the machine decides when a job ends, and how."""

    def __init__(self) -> None:
        self.jobs: list[tuple[AdapterId, Callable[[], LoaderMessage]]] = []

    def read_card(self, adapter: AdapterId, folder: Path) -> None:
        del folder
        self.jobs.append((adapter, lambda: CardRead(adapter, CARD)))

    def fetch(self, adapter: AdapterId, folder: Path) -> None:
        del folder
        checkpoint = checkpoint_of(adapter)
        self.jobs.append((adapter, lambda: Fetched(adapter, checkpoint, plan_image(checkpoint, SPEC.groups))))

    def write(self, adapter: AdapterId, checkpoint: Checkpoint, layout: ImageLayout, run: torch.Tensor) -> None:
        def job() -> LoaderMessage:
            run.fill_(float("nan"))
            write_image(checkpoint, layout, run)
            return Written(adapter)

        self.jobs.append((adapter, job))


class ResidencyMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.arena = RankArena(4 * 900)  # holds some of the adapters, never all
        self.slots = SlotTable(len(SPEC.sites), SPEC.groups, num_slots=1)
        self.loader = FakeLoader()
        self.states: dict[AdapterId, AdapterState] = {}
        self.residency = Residency(SPEC, self.arena, self.slots, self.loader, self.changed, lambda _a, _e: None)  # pyright: ignore
        self.held: list[tuple[AdapterId, Resident]] = []
        self.futures: list[Future[AdapterInfo] | Future[Unloaded]] = []
        for adapter in ADAPTERS:
            self.residency.register(adapter, Path("x"), Future(), keep_failed=False)
        while self.loader.jobs:
            self.residency.handle(self.loader.jobs.pop(0)[1]())

    def changed(self, info: AdapterInfo) -> None:
        before = self.states.get(info.id)
        assert before is None or info.state in LEGAL_MOVES[before], f"{before} → {info.state}"
        self.states[info.id] = info.state

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def load(self, adapter: AdapterId) -> None:
        future: Future[AdapterInfo] = Future()
        self.residency.load(adapter, future)
        self.futures.append(future)

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def want(self, adapter: AdapterId) -> None:
        try:
            self.residency.want(adapter)
        except AdapterFailed:
            assert self.states[adapter] is AdapterState.FAILED

    @rule(adapter=st.sampled_from(sorted(ADAPTERS)))
    def unload(self, adapter: AdapterId) -> None:
        future: Future[Unloaded] = Future()
        self.residency.unload(adapter, future)
        self.futures.append(future)

    @precondition(lambda self: self.loader.jobs)
    @rule(data=st.data(), fails=st.booleans())
    def loader_ends_a_job(self, data: st.DataObject, fails: bool) -> None:
        adapter, job = self.loader.jobs.pop(data.draw(st.integers(0, len(self.loader.jobs) - 1)))
        message = LoadFailed(adapter, AdapterRejected("TEST", "file", "was refused")) if fails else job()
        self.residency.handle(message)

    @precondition(lambda self: any(self.residency.is_ready(a) for a in ADAPTERS))
    @rule(data=st.data())
    def batch_starts(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from([a for a in ADAPTERS if self.residency.is_ready(a)]))
        self.held.append((adapter, self.residency.acquire(adapter)))

    @precondition(lambda self: self.held)
    @rule()
    def batch_ends(self) -> None:
        adapter, _ = self.held.pop(0)
        self.residency.release(adapter)

    @rule()
    def between_steps(self) -> None:
        self.residency.settle()

    @invariant()
    def whole(self) -> None:
        self.residency.check_integrity()

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
        for _ in range(200):
            self.residency.settle()
            if not self.loader.jobs:
                break
            self.residency.handle(self.loader.jobs.pop(0)[1]())
        self.residency.settle()
        assert all(future.done() for future in self.futures), "a load or an unload was never answered"
        for future in self.futures:
            assert future.exception() is None or isinstance(future.exception(), MultiloraError)
        self.residency.check_integrity()


def test_small_adapters_do_not_overtake_a_large_one_that_waits_for_copies_to_end() -> None:
    machine = ResidencyMachine()
    tiny, small, medium, large = (AdapterId("default", f"a{i}", 1) for i in range(4))

    def fetch(*adapters: AdapterId) -> None:
        for adapter in adapters:
            machine.load(adapter)
            machine.residency.handle(machine.loader.jobs.pop()[1]())
        machine.between_steps()

    fetch(medium, small)
    assert {machine.states[medium], machine.states[small]} == {AdapterState.COPYING}
    fetch(large, tiny)
    assert {machine.states[large], machine.states[tiny]} == {AdapterState.HOST}, "a tiny one overtook"
    while machine.loader.jobs:
        machine.residency.handle(machine.loader.jobs.pop()[1]())
    machine.between_steps()
    assert {machine.states[large], machine.states[tiny]} == {AdapterState.COPYING}
    machine.teardown()


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
