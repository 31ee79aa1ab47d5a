"""Adapters on their way in and out of a running engine: downloads, pins, deletions, a second tier, a stuck load."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch

from lora_runtime.adapters.loader import LocalFolder
from lora_runtime.adapters.sources.api import Origin
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.engine import Engine
from lora_runtime.engine_settings import EngineSettings
from lora_runtime.errors import (
    AdapterFailed,
    AdapterInUse,
    AdapterNotFound,
    AdapterRejected,
    EngineStopped,
    InvalidRequest,
    LoadCancelled,
    SourceUnavailable,
)
from lora_runtime.observers import EngineObserver
from lora_runtime.shares import Shares
from lora_runtime.types import AdapterId, AdapterState, Alias, Request, Task, TokenSequence
from tests.fakes import FakeRunner, fake_spec
from tests.unit.test_engine import adapter_id, save


class Store:
    """Fetches from a folder, as slowly and as badly as a test wants."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.num_fetches = 0

    def open(self, origin: Origin, stop: threading.Event) -> LocalFolder:
        if origin.path is not None:
            return LocalFolder(origin.path)
        self.num_fetches += 1
        while not self.gate.wait(0.01):
            if stop.is_set():
                raise LoadCancelled(origin.url)
        if self.fault is not None:
            raise self.fault
        return LocalFolder(self.root / origin.url.rpartition("/")[2])


class Rig:
    def __init__(self, root: Path, arena_bytes: int = 1 << 20, host_bytes: int | None = None) -> None:
        self.root, self.store, self.runner = root, Store(root), FakeRunner()
        spec = fake_spec()
        self.arena = RankArena(arena_bytes)
        self.host = None if host_bytes is None else RankArena(host_bytes)
        slots = SlotTable(len(spec.sites), spec.groups)
        self.engine = Engine(spec, self.runner, self.arena, slots, EngineSettings(), host=self.host, fetcher=self.store)
        self.engine.start()
        self.count = 0

    def add(self, number: int, *, remote: bool = False, version: int = 1, answers: int | None = None) -> None:
        folder = save(self.root / f"a{number}-{version}", number if answers is None else answers)
        origin = Origin(f"s3://bucket/{folder.name}", "etag") if remote else Origin(str(folder))
        self.engine.register(adapter_id(number, version), origin).result(5)

    def ask(self, number: int, version: int = 1, deadline: float | None = None) -> float:
        self.count += 1
        sequences = (TokenSequence((1, 1, 1), None),)
        request = Request(f"r{self.count}", adapter_id(number, version), Task.CLASSIFY, sequences, deadline)
        return self.engine.submit(request).result(5).outputs[0].logits[0]  # pyright: ignore

    def state(self, number: int, version: int = 1) -> AdapterState:
        return self.engine.catalogue.get(adapter_id(number, version)).state


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(**sizes: int) -> Rig:
        rigs.append(Rig(tmp_path, **sizes))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.store.gate.set()
        with contextlib.suppress(EngineStopped):
            rig.engine.check_integrity()
        rig.engine.stop(1)


def test_an_adapter_from_a_url_is_fetched_on_first_use_and_read_before_it_is_asked(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(1, remote=True)
    assert not rig.engine.catalogue.get(adapter_id(1)).is_read
    with pytest.raises(InvalidRequest, match="not been read"):
        rig.ask(1)
    info = rig.engine.prefetch(adapter_id(1)).result(5)
    assert info.card is not None and info.path is not None
    assert rig.ask(1) == 4.0
    assert rig.store.num_fetches == 1


def test_a_download_stalls_nobody_and_ends_when_the_adapter_is_unloaded(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(0)
    rig.store.gate.clear()
    for number in range(1, 7):  # more than there are threads for downloads
        rig.add(number, remote=True)
    loads = [rig.engine.load(adapter_id(number)) for number in range(1, 7)]
    assert rig.ask(0) == 3.0, "a local adapter waited for downloads"
    freed = [rig.engine.unload(adapter_id(number)).result(5).freed_bytes for number in range(1, 7)]
    assert freed == [0] * 6
    for load in loads:
        with pytest.raises(LoadCancelled):
            load.result(5)
    assert {rig.state(number) for number in range(1, 7)} == {AdapterState.REGISTERED}


def test_a_store_out_of_reach_fails_those_who_wait_and_is_tried_again_after_a_while(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(1, remote=True)
    rig.store.fault = SourceUnavailable("s3://bucket", "is out of reach", retry_after_s=0.2)
    with pytest.raises(AdapterFailed, match="out of reach"):
        rig.engine.prefetch(adapter_id(1)).result(5)
    assert rig.state(1) is AdapterState.FAILED
    rig.store.fault = None
    with pytest.raises(AdapterFailed):
        rig.engine.prefetch(adapter_id(1)).result(5)  # not at once: a store that is down is not hammered
    time.sleep(0.25)
    assert rig.engine.prefetch(adapter_id(1)).result(5).failure is None
    assert rig.ask(1) == 4.0


def test_what_is_refused_for_good_is_not_fetched_again_by_requests(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(1, remote=True)
    rig.store.fault = AdapterRejected("SOURCE_MISSING", "s3://bucket/a1", "is not there")
    for _ in range(3):
        with pytest.raises(AdapterFailed, match="is not there"):
            rig.engine.prefetch(adapter_id(1)).result(5)
    assert rig.store.num_fetches == 1
    rig.store.fault = None
    assert rig.engine.load(adapter_id(1)).result(5).state is AdapterState.READY


def test_a_hundred_callers_at_once_load_once(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(1, remote=True)
    rig.store.gate.clear()
    loads = [rig.engine.load(adapter_id(1)) for _ in range(50)]
    loads += [rig.engine.prefetch(adapter_id(1)) for _ in range(50)]
    rig.store.gate.set()
    assert {load.result(5).id for load in loads} == {adapter_id(1)}
    assert rig.store.num_fetches == 1


def test_a_pinned_adapter_is_neither_evicted_nor_unloaded(make: Callable[..., Rig]) -> None:
    rig = make(arena_bytes=2 * 320)  # room for two
    for number in range(4):
        rig.add(number)
    assert rig.engine.pin(adapter_id(0)).result(5).pinned
    for number in (1, 2, 3, 1, 2, 3):
        assert rig.ask(number) == number + 3.0
    assert rig.state(0) is AdapterState.READY
    with pytest.raises(AdapterInUse, match="unpin"):
        rig.engine.unload(adapter_id(0)).result(5)
    with pytest.raises(AdapterInUse, match="unpin"):
        rig.engine.delete(adapter_id(0)).result(5)
    assert not rig.engine.pin(adapter_id(0), pinned=False).result(5).pinned
    assert rig.engine.unload(adapter_id(0)).result(5).freed_bytes > 0


def test_pins_that_leave_no_room_are_named_in_the_refusal_and_a_failed_pin_is_none(make: Callable[..., Rig]) -> None:
    rig = make(arena_bytes=2 * 320)
    for number in range(3):
        rig.add(number)
    rig.engine.pin(adapter_id(0)).result(5)
    rig.engine.pin(adapter_id(1)).result(5)
    with pytest.raises(AdapterFailed, match="pinned adapters leave less"):
        rig.engine.pin(adapter_id(2)).result(5)
    assert not rig.engine.catalogue.get(adapter_id(2)).pinned
    rig.engine.pin(adapter_id(0), pinned=False).result(5)
    assert rig.engine.load(adapter_id(2)).result(5).state is AdapterState.READY


def test_a_deleted_adapter_answers_what_is_queued_and_is_then_unknown(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(1)
    rig.engine.load(adapter_id(1)).result(5)
    rig.runner.gate.clear()
    sequences = (TokenSequence((1, 1, 1), None),)
    queued = [rig.engine.submit(Request(f"q{n}", adapter_id(1), Task.CLASSIFY, sequences * 3, None)) for n in range(5)]
    deleted = rig.engine.delete(adapter_id(1))
    rig.runner.gate.set()
    assert [future.result(5).outputs[0].logits[0] for future in queued] == [4.0] * 5  # pyright: ignore
    assert deleted.result(5).freed_bytes > 0
    with pytest.raises(AdapterNotFound):
        rig.ask(1)
    assert rig.arena.used_bytes == 0
    rig.engine.register(adapter_id(1), Origin(str(rig.root / "a1-1"))).result(5)
    assert rig.ask(1) == 4.0


def test_deleting_what_is_still_being_fetched_fails_those_who_wait(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(1, remote=True)
    rig.store.gate.clear()
    load, read = rig.engine.load(adapter_id(1)), rig.engine.prefetch(adapter_id(1))
    assert rig.engine.delete(adapter_id(1)).result(5).freed_bytes == 0
    for waiting in (load, read):
        with pytest.raises(LoadCancelled):
            waiting.result(5)
    with pytest.raises(AdapterNotFound):
        rig.engine.load(adapter_id(1)).result(5)


def test_a_version_that_an_alias_leads_to_is_not_deleted(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.add(1)
    rig.add(1, version=2, answers=7)
    with pytest.raises(AdapterInUse, match="default"):
        rig.engine.delete(adapter_id(1)).result(5)
    rig.engine.set_alias(Alias("default", "a1", "default", 2)).result(5)
    rig.engine.delete(adapter_id(1)).result(5)
    assert rig.ask(1, version=2) == 10.0


def test_with_a_second_tier_an_evicted_adapter_comes_back_without_its_files(make: Callable[..., Rig]) -> None:
    rig = make(arena_bytes=2 * 320, host_bytes=4 * 320)
    for number in range(4):
        rig.add(number)
        assert rig.ask(number) == number + 3.0
    assert {rig.state(number) for number in range(4)} == {AdapterState.READY, AdapterState.HOST}
    for number in range(4):
        (rig.root / f"a{number}-1" / "adapter_model.safetensors").unlink()
    for number in (0, 3, 1, 2, 0):
        assert rig.ask(number) == number + 3.0
    info = rig.engine.catalogue.get(adapter_id(0))
    assert info.host_bytes == info.resident_bytes > 0
    unloaded = rig.engine.unload(adapter_id(0)).result(5)
    assert (unloaded.freed_bytes, unloaded.freed_host_bytes) == (info.resident_bytes, info.host_bytes)
    assert rig.state(0) is AdapterState.REGISTERED
    with pytest.raises(AdapterFailed, match=r"adapter_model\.safetensors"):
        rig.ask(0)


def test_observers_are_told_who_made_room_and_not_who_was_unloaded(make: Callable[..., Rig]) -> None:
    told: list[tuple[int, str]] = []

    class Evictions(EngineObserver):
        def on_evicted(self, adapter: AdapterId, tier: str) -> None:
            told.append((int(adapter.name[1:]), tier))

    rig = make(arena_bytes=2 * 320, host_bytes=3 * 320)
    rig.engine.add_observer(Evictions())
    for number in range(4):
        rig.add(number)
        rig.ask(number)
        rig.engine.check_integrity()
    assert [tier for _, tier in told] == ["device", "host", "device"]
    assert all(rig.state(number) is not AdapterState.READY for number, _ in told)
    rig.engine.unload(adapter_id(3)).result(5)
    assert len(told) == 3


def test_with_a_second_tier_more_adapters_than_it_holds_are_all_answered(make: Callable[..., Rig]) -> None:
    rig = make(arena_bytes=2 * 320, host_bytes=3 * 320)
    for number in range(7):
        rig.add(number)
    for number in [n % 7 for n in range(0, 80, 3)]:
        assert rig.ask(number) == number + 3.0
    assert rig.host is not None and rig.host.used_bytes <= rig.host.num_bytes
    for number in range(7):
        rig.engine.unload(adapter_id(number)).result(5)
    assert (rig.arena.used_bytes, rig.host.used_bytes) == (0, 0)


def test_a_load_that_hangs_does_not_keep_the_engine_from_stopping(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    rig.add(1)
    release = threading.Event()
    monkeypatch.setattr("lora_runtime.adapters.loader.plan_adapter", lambda *_: release.wait(30))
    rig.engine.load(adapter_id(1))
    started = time.monotonic()
    rig.engine.check_integrity()
    rig.engine.stop(1)
    assert time.monotonic() - started < 5
    release.set()


def test_folders_that_nobody_asked_for_are_examined_in_the_background(make: Callable[..., Rig]) -> None:
    rig = make()
    good, bad = save(rig.root / "good", 1), save(rig.root / "bad", 2)
    (bad / "adapter_config.json").write_text("{")
    for number, folder in ((1, good), (2, bad)):
        info = rig.engine.register(adapter_id(number), folder, examine=False).result(5)
        assert info.state is AdapterState.REGISTERED
    deadline = time.monotonic() + 5
    while not all(info.is_read for info in rig.engine.catalogue.all()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (rig.state(1), rig.state(2)) == (AdapterState.REGISTERED, AdapterState.FAILED)
    (bad / "adapter_config.json").write_text((good / "adapter_config.json").read_text())
    assert rig.engine.examine(adapter_id(2)).result(5).state is AdapterState.REGISTERED
    assert rig.ask(2) == 5.0


class OneForSmall(Shares):
    """The tenant `small` may hold one adapter."""

    def resident_bytes_of(self, tenant: str) -> int | None:
        return 320 if tenant == "small" else None


def test_loads_that_wait_for_their_own_tenants_quota_hold_up_nobody_else(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.engine.use_shares(OneForSmall())
    folder = save(rig.root / "shared", 1)
    small = [AdapterId("small", f"a{number}", 1) for number in range(20)]
    for adapter in small:
        rig.engine.register(adapter, folder).result(5)
    rig.engine.load(small[0]).result(5)
    rig.engine.hold(small[:1])
    waiting = [rig.engine.load(adapter) for adapter in small[1:]]  # more than are looked at without room
    rig.add(5)
    assert rig.engine.load(adapter_id(5)).result(5).state is AdapterState.READY
    assert rig.ask(5) == 8.0
    assert not any(load.done() for load in waiting)
    assert sum(info.resident_bytes for info in rig.engine.catalogue.list("small")) <= 320


def test_a_refusal_that_is_kept_keeps_no_file_in_memory(make: Callable[..., Rig]) -> None:
    """The frames of its traceback would hold what was read of the files."""
    rig = make()
    rig.add(1)
    tensors = safetensors.torch.load_file(rig.root / "a1-1" / "adapter_model.safetensors")
    tensors["base_model.model.classifier.bias"][0] = float("nan")
    safetensors.torch.save_file(tensors, rig.root / "a1-1" / "adapter_model.safetensors")
    with pytest.raises(AdapterFailed, match="NaN"):
        rig.engine.load(adapter_id(1)).result(5)
    failure = rig.engine.catalogue.get(adapter_id(1)).failure
    assert failure is not None
    assert failure.__traceback__ is failure.__cause__ is failure.__context__ is None
