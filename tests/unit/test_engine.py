"""The engine's promises, with a fake model: one terminal reply each, isolation, no waiting for a loading adapter."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_runtime.adapters.checkpoint import read_planned
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.engine import Engine
from lora_runtime.engine_settings import EngineSettings
from lora_runtime.engine_stats import engine_stats
from lora_runtime.errors import (
    AdapterAlreadyExists,
    AdapterFailed,
    AdapterNotFound,
    AdapterRejected,
    AnswerNotFinite,
    DeadlineExpired,
    EngineStopped,
    InvalidRequest,
    MultiloraError,
    RequestCancelled,
)
from lora_runtime.observers import EngineObserver
from lora_runtime.scheduler import Scheduler
from lora_runtime.types import (
    AdapterId,
    AdapterState,
    BatchStats,
    Request,
    Result,
    Task,
    TokenSequence,
)
from tests.fakes import WIDTH, FakeRunner, fake_spec


def adapter_id(number: int, version: int = 1) -> AdapterId:
    return AdapterId("default", f"a{number}", version)


def save(folder: Path, number: int, rank: int = 2) -> Path:
    """A folder whose answers are recognisable: logits are number, number + 0.5, plus the tokens of the text."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": 4}}')
    tensors = {f"base_model.model.fake.layer.q.lora_{w}.weight": torch.ones(s) for w, s in _shapes(rank)}
    tensors["base_model.model.classifier.weight"] = torch.ones(2, WIDTH)
    tensors["base_model.model.classifier.bias"] = torch.tensor([float(number), number + 0.5])
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _shapes(rank: int) -> list[tuple[str, tuple[int, int]]]:
    return [("A", (rank, WIDTH)), ("B", (WIDTH, rank))]


class Recorder(EngineObserver):
    """Keeps everything the engine tells."""

    def __init__(self) -> None:
        self.results: list[tuple[str, Result | MultiloraError]] = []
        self.batches: list[BatchStats] = []

    def on_batch(self, stats: BatchStats) -> None:
        self.batches.append(stats)

    def on_result(self, request: Request, result: Result | MultiloraError) -> None:
        self.results.append((request.request_id, result))


class Rig:
    def __init__(self, folder: Path, num_adapters: int = 3, arena_bytes: int = 1 << 20, **settings: int) -> None:
        self.runner = FakeRunner()
        spec = fake_spec()
        slots = SlotTable(len(spec.sites), spec.groups)
        self.recorder = Recorder()
        self.arena = RankArena(arena_bytes)
        self.engine = Engine(spec, self.runner, self.arena, slots, EngineSettings(**settings))
        self.engine.add_observer(self.recorder)
        self.engine.start()
        self.count = 0
        for number in range(num_adapters):
            self.engine.register(adapter_id(number), save(folder / f"a{number}", number)).result(5)

    def request(self, number: int, lengths: tuple[int, ...] = (3,), deadline: float | None = None) -> Request:
        self.count += 1
        sequences = tuple(TokenSequence((1,) * n, None) for n in lengths)
        return Request(f"r{self.count}", adapter_id(number), Task.CLASSIFY, sequences, deadline)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(**settings: int) -> Rig:
        rigs.append(Rig(tmp_path, **settings))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.runner.gate.set()
        rig.engine.stop(1)


def test_a_request_loads_its_adapter_on_first_use_and_is_answered_by_it(make: Callable[..., Rig]) -> None:
    rig = make()
    result = rig.engine.submit(rig.request(2, (3, 7))).result(5)
    assert [output.logits for output in result.outputs] == [(5.0, 5.5), (9.0, 9.5)]
    assert sum(result.outputs[0].scores) == pytest.approx(1)
    assert result.adapter == adapter_id(2)
    assert result.card.labels == ("LABEL_0", "LABEL_1")
    assert result.timings.load_wait_s > 0
    assert rig.engine.submit(rig.request(2)).result(5).timings.load_wait_s == 0


def test_what_waits_and_runs_is_told_while_a_batch_runs_and_a_stuck_loop_shows(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.engine.load(adapter_id(0)).result(5)
    rig.runner.gate.clear()
    running = rig.engine.submit(rig.request(0))
    until(lambda: rig.engine.stats().num_running == 1)
    turned_at = rig.engine.stats().turned_at
    time.sleep(0.15)  # three turns of an idle loop
    assert rig.engine.stats().turned_at == turned_at, "the loop is in a batch that does not end"
    waiting = rig.engine.submit(rig.request(0, (3, 4)))
    rig.runner.gate.set()
    running.result(5)
    waiting.result(5)
    until(lambda: rig.engine.stats().turned_at > turned_at)
    stats = rig.engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_queued_sequences, stats.num_queued_tokens) == (0, 0, 0, 0)


def test_requests_for_an_adapter_that_loads_are_waiting(make: Callable[..., Rig]) -> None:
    rig = make(num_adapters=1)
    stats = engine_stats(queue_of(rig.request(0, (3, 4)), rig.request(0)), turned_at=1.0)
    assert (stats.num_waiting, stats.num_running) == (2, 0)
    assert (stats.num_queued_sequences, stats.num_queued_tokens) == (3, 10)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def queue_of(*requests: Request) -> Scheduler:
    scheduler = Scheduler(256, 256)
    for request in requests:
        scheduler.add(request, Future(), 0.0)
    return scheduler


def test_adapters_are_mixed_in_one_batch_with_rows_of_one_adapter_adjacent(make: Callable[..., Rig]) -> None:
    rig = make()
    for number in range(3):
        rig.engine.load(adapter_id(number)).result(5)
    rig.runner.gate.clear()
    futures = [rig.engine.submit(rig.request(0))]
    time.sleep(0.1)
    futures += [rig.engine.submit(rig.request(n % 3, (2 + n % 2,))) for n in range(9)]
    time.sleep(0.1)
    rig.runner.gate.set()
    for n, future in enumerate(futures[1:]):
        assert future.result(5).outputs[0].logits[0] == n % 3 + 2 + n % 2
    last = rig.runner.batches[-1]
    slots = [row.slot for row in last]
    assert len(last) == 9
    assert sum(a != b for a, b in pairwise(slots)) == 2
    assert rig.recorder.batches[-1].num_adapters == 3
    assert rig.recorder.batches[-1].num_tokens == sum(row.sequence.num_tokens for row in last)


def test_a_request_larger_than_the_budget_is_split_and_answered_in_order(make: Callable[..., Rig]) -> None:
    rig = make(token_budget=64)
    result = rig.engine.submit(rig.request(1, tuple(range(1, 41)))).result(5)
    assert [output.logits[0] for output in result.outputs] == [1.0 + n for n in range(1, 41)]
    assert len(rig.runner.batches) > 1
    assert all(stats.num_tokens <= 64 for stats in rig.recorder.batches)


def test_a_slow_load_does_not_delay_other_adapters(make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_runtime.adapters import loader

    rig = make()
    rig.engine.load(adapter_id(0)).result(5)
    release = threading.Event()
    read = loader.read_planned

    def slow(*args: object) -> object:
        release.wait(10)
        return read(*args)  # pyright: ignore

    monkeypatch.setattr(loader, "read_planned", slow)
    waiting = rig.engine.submit(rig.request(1))
    for _ in range(20):
        assert rig.engine.submit(rig.request(0)).result(1).outputs[0].logits[0] == 3.0
    assert not waiting.done()
    release.set()
    assert waiting.result(5).outputs[0].logits[0] == 4.0


def test_an_unknown_adapter_is_not_found_and_never_answered_by_another(make: Callable[..., Rig]) -> None:
    rig = make()
    with pytest.raises(AdapterNotFound, match="default/a9@1"):
        rig.engine.submit(rig.request(9)).result(5)
    with pytest.raises(AdapterNotFound):
        rig.engine.load(adapter_id(0, version=2)).result(5)


def test_a_refused_adapter_fails_its_requests_with_the_reason_and_nobody_elses(
    make: Callable[..., Rig], tmp_path: Path
) -> None:
    rig = make()
    (tmp_path / "a1" / "adapter_model.safetensors").write_bytes(b"nothing")
    bad, good = rig.engine.submit(rig.request(1)), rig.engine.submit(rig.request(0))
    with pytest.raises(AdapterFailed, match="cut short"):
        bad.result(5)
    assert good.result(5).outputs[0].logits[0] == 3.0
    with pytest.raises(AdapterFailed):
        rig.engine.submit(rig.request(1)).result(5)
    import shutil

    shutil.rmtree(tmp_path / "a1")
    save(tmp_path / "a1", 1)
    assert rig.engine.load(adapter_id(1)).result(5).state is AdapterState.READY


def test_the_wait_for_the_running_batch_counts_as_queue_time(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.engine.load(adapter_id(0)).result(5)
    rig.runner.gate.clear()
    first = rig.engine.submit(rig.request(0))
    time.sleep(0.05)
    second = rig.engine.submit(rig.request(0))
    time.sleep(0.2)
    rig.runner.gate.set()
    assert first.result(5).timings.forward_s > 0.2
    assert second.result(5).timings.queue_s > 0.19


def test_a_version_is_immutable(make: Callable[..., Rig], tmp_path: Path) -> None:
    import shutil

    rig = make()
    with pytest.raises(AdapterAlreadyExists):
        rig.engine.register(adapter_id(0), tmp_path / "a0").result(5)
    rig.engine.load(adapter_id(0)).result(5)
    rig.engine.unload(adapter_id(0)).result(5)
    shutil.rmtree(tmp_path / "a0")
    save(tmp_path / "a0", 50)
    with pytest.raises(AdapterFailed, match="immutable"):
        rig.engine.load(adapter_id(0)).result(5)


def test_a_folder_with_bad_json_is_refused_or_kept_as_failed(make: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make()
    save(tmp_path / "bad", 1)
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    bad = AdapterId("default", "bad", 1)
    with pytest.raises(AdapterRejected, match="not valid JSON"):
        rig.engine.register(bad, tmp_path / "bad").result(5)
    with pytest.raises(AdapterNotFound):
        rig.engine.catalogue.get(bad)
    with pytest.raises(AdapterRejected):
        rig.engine.register(bad, tmp_path / "bad", keep_failed=True).result(5)
    assert rig.engine.catalogue.get(bad).state is AdapterState.FAILED


def test_a_folder_with_bad_json_is_served_once_it_is_mended(make: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make(num_adapters=1)
    config = save(tmp_path / "a7", 7) / "adapter_config.json"
    good = config.read_text()
    config.write_text("{")
    with pytest.raises(AdapterRejected):
        rig.engine.register(adapter_id(7), tmp_path / "a7", keep_failed=True).result(5)
    with pytest.raises(AdapterFailed, match="not valid JSON"):
        rig.engine.load(adapter_id(7)).result(5)
    with pytest.raises(AdapterFailed, match="not valid JSON"):
        rig.engine.submit(rig.request(7)).result(5)
    config.write_text(good)
    info = rig.engine.load(adapter_id(7)).result(5)
    assert (info.state, info.failure) == (AdapterState.READY, None)
    assert info.card is not None and info.card.task is Task.CLASSIFY
    assert rig.engine.submit(rig.request(7)).result(5).outputs[0].logits[0] == 10.0
    rig.engine.check_integrity()


def test_while_mended_json_is_read_again_nobody_is_answered_unchecked(
    make: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What task the adapter has is not known yet, so no request can be matched with it."""
    rig = make(num_adapters=1)
    folder = save(tmp_path / "a7", 7)
    good = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterRejected):
        rig.engine.register(adapter_id(7), folder, keep_failed=True).result(5)
    (folder / "adapter_config.json").write_text(good)
    gate = threading.Event()

    def slow(*args: object) -> object:
        gate.wait(5)
        return read_planned(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("lora_runtime.adapters.loader.read_planned", slow)
    loading = rig.engine.load(adapter_id(7))
    request = replace(rig.request(7), task=Task.EMBED)
    with pytest.raises(AdapterFailed, match="not valid JSON"):
        rig.engine.submit(request).result(5)
    gate.set()
    assert loading.result(5).state is AdapterState.READY


def test_unload_frees_the_bytes_and_a_later_request_loads_again(make: Callable[..., Rig]) -> None:
    rig = make()
    resident = rig.engine.load(adapter_id(0)).result(5).resident_bytes
    assert rig.arena.used_bytes == resident > 0
    assert rig.engine.unload(adapter_id(0)).result(5).freed_bytes == resident
    assert rig.arena.used_bytes == 0
    assert rig.engine.unload(adapter_id(0)).result(5).freed_bytes == 0
    assert rig.engine.submit(rig.request(0)).result(5).outputs[0].logits[0] == 3.0


def test_more_adapters_than_fit_are_all_answered(make: Callable[..., Rig]) -> None:
    """The arena holds two of six: idle ones make room."""
    rig = make(num_adapters=6, arena_bytes=2 * 320)
    futures = [(n % 6, rig.engine.submit(rig.request(n % 6))) for n in range(60)]
    for number, future in futures:
        assert future.result(10).outputs[0].logits[0] == number + 3.0
    rig.engine.check_integrity()
    assert rig.arena.used_bytes <= 2 * 320


def test_an_adapter_wider_than_the_arena_is_refused_with_the_sizes(make: Callable[..., Rig]) -> None:
    rig = make(num_adapters=1, arena_bytes=128)
    with pytest.raises(AdapterFailed, match="give it more"):
        rig.engine.submit(rig.request(0)).result(5)


def test_a_failing_batch_fails_its_requests_and_the_engine_goes_on(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.engine.load(adapter_id(0)).result(5)
    rig.runner.fail_next = RuntimeError("out of memory with the text of a request")
    with pytest.raises(MultiloraError) as caught:
        rig.engine.submit(rig.request(0)).result(5)
    assert "text of a request" not in caught.value.message
    assert rig.engine.submit(rig.request(0)).result(5).outputs


def test_a_tokenizer_that_changes_before_the_first_load_is_refused(make: Callable[..., Rig], tmp_path: Path) -> None:
    """Requests that wait for the load hold the token ids of the one before."""
    rig = make(num_adapters=1)
    folder = save(tmp_path / "a7", 7)
    rig.engine.register(adapter_id(7), folder).result(5)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    with pytest.raises(AdapterFailed, match="changed since it was registered"):
        rig.engine.submit(rig.request(7)).result(5)


def test_a_token_without_a_row_in_the_embedding_is_refused_before_it_joins_a_batch(make: Callable[..., Rig]) -> None:
    rig = make(num_adapters=1)
    info = rig.engine.load(adapter_id(0)).result(5)
    assert info.card is not None
    rig.engine.call(lambda: rig.engine.catalogue.put(replace(info, card=replace(info.card, num_token_ids=9))))
    request = rig.request(0, (3, 3))
    ids = (request.sequences[0], TokenSequence((1, 9, 2), None))
    with pytest.raises(InvalidRequest, match=r"inputs\[1\]\.text.* token id 9") as caught:
        rig.engine.submit(replace(request, sequences=ids)).result(5)
    assert caught.value.field == "inputs[1].text"
    assert rig.runner.batches == []


def test_a_request_that_cannot_be_run_takes_no_other_of_its_batch_along(make: Callable[..., Rig]) -> None:
    rig = make()
    for number in (0, 1):
        rig.engine.load(adapter_id(number)).result(5)
    rig.runner.cannot_run = 9  # tokens
    rig.runner.gate.clear()
    first = rig.engine.submit(rig.request(0))
    time.sleep(0.05)
    good = [rig.engine.submit(rig.request(number, (4, 5))) for number in (0, 1)]
    bad = [rig.engine.submit(rig.request(number, (3, 9))) for number in (0, 1)]
    rig.runner.gate.set()
    assert first.result(5).outputs
    for number, future in enumerate(good):
        assert [output.logits[0] for output in future.result(5).outputs] == [number + 4.0, number + 5.0]
    for future in bad:
        with pytest.raises(MultiloraError, match="IndexError"):
            future.result(5)
    assert len(rig.runner.batches[1]) == 8, "all of them were one batch"
    rig.engine.check_integrity()


def test_a_cancelled_request_is_answered_once_and_runs_in_no_batch(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.engine.load(adapter_id(0)).result(5)
    rig.runner.gate.clear()
    first = rig.engine.submit(rig.request(0))
    time.sleep(0.1)
    request = rig.request(0, (5,))
    second = rig.engine.submit(request)
    rig.engine.cancel(request.request_id)
    rig.engine.cancel("never heard of")
    rig.runner.gate.set()
    assert first.result(5)
    with pytest.raises(RequestCancelled):
        second.result(5)
    assert rig.engine.submit(rig.request(0)).result(5)
    assert all(row.sequence.num_tokens == 3 for batch in rig.runner.batches for row in batch)
    assert [i for i, _ in rig.recorder.results].count(request.request_id) == 1


def test_a_passed_deadline_is_answered_without_a_forward_pass(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.engine.load(adapter_id(0)).result(5)
    rig.runner.gate.clear()
    first = rig.engine.submit(rig.request(0))
    time.sleep(0.1)
    late = rig.engine.submit(rig.request(0, (9,), deadline=time.monotonic() + 0.05))
    time.sleep(0.1)
    rig.runner.gate.set()
    assert first.result(5)
    with pytest.raises(DeadlineExpired):
        late.result(5)
    assert all(row.sequence.num_tokens == 3 for batch in rig.runner.batches for row in batch)


def test_stop_answers_what_was_admitted_and_refuses_what_comes_later(make: Callable[..., Rig]) -> None:
    rig = make()
    futures = [rig.engine.submit(rig.request(n % 3)) for n in range(30)]
    rig.engine.stop(5)
    assert all(future.result(0) for future in futures)
    with pytest.raises(EngineStopped):
        rig.engine.submit(rig.request(0)).result(1)
    with pytest.raises(EngineStopped):
        rig.engine.load(adapter_id(0)).result(1)


def test_loads_and_unloads_in_a_loop_while_clients_ask_lose_nothing(make: Callable[..., Rig]) -> None:
    rig = make(num_adapters=8)
    stop = threading.Event()
    wrong: list[object] = []

    def client(seed: int) -> None:
        for n in range(60):
            number = (seed + n * 5) % 8
            try:
                result = rig.engine.submit(rig.request(number, (1 + n % 5,))).result(20)
                if result.outputs[0].logits[0] != number + 1 + n % 5:
                    wrong.append((number, result))
            except Exception as error:  # noqa: BLE001  the test reports any failure
                wrong.append(error)

    def churn() -> None:
        while not stop.is_set():
            for number in range(8):
                rig.engine.unload(adapter_id(number))
                rig.engine.load(adapter_id(number))
            rig.engine.check_integrity()

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
    churner = threading.Thread(target=churn)
    for thread in [*clients, churner]:
        thread.start()
    for thread in clients:
        thread.join()
    stop.set()
    churner.join()
    assert not wrong
    assert len(rig.recorder.results) == 16 * 60, "each request has exactly one terminal reply"


def test_an_engine_that_fails_answers_everybody_and_says_that_it_ended(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    rig.engine.load(adapter_id(0)).result(5)
    rig.runner.gate.clear()
    futures = [rig.engine.submit(rig.request(0)) for _ in range(3)]
    time.sleep(0.1)
    futures += [rig.engine.submit(rig.request(n)) for n in range(3)]

    def broken(*_: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lora_runtime.engine.output_of", broken)
    rig.runner.gate.set()
    for future in futures:
        with pytest.raises(EngineStopped):
            future.result(5)
    with pytest.raises(EngineStopped, match="failed"):
        rig.engine.ended.result(5)
    with pytest.raises(EngineStopped):
        rig.engine.submit(rig.request(0)).result(5)
    with pytest.raises(EngineStopped):
        rig.engine.load(adapter_id(1)).result(5)
    assert len(rig.recorder.results) == len(futures)


def test_a_caller_that_cancels_its_future_disturbs_nobody(make: Callable[..., Rig]) -> None:
    rig = make()
    for operation in (rig.engine.load, rig.engine.unload):
        future = operation(adapter_id(0))
        future.cancel()
    rig.engine.submit(rig.request(1)).cancel()
    assert rig.engine.submit(rig.request(0)).result(5)
    assert rig.engine.load(adapter_id(1)).result(5)
    rig.engine.check_integrity()


def test_a_request_without_sequences_or_tokens_or_with_a_known_id_is_refused(make: Callable[..., Rig]) -> None:
    rig = make()
    for lengths in ((), (3, 0)):
        with pytest.raises(InvalidRequest):
            rig.engine.submit(rig.request(0, lengths)).result(5)
    rig.engine.load(adapter_id(0)).result(5)
    rig.runner.gate.clear()
    request = rig.request(0)
    first, second = rig.engine.submit(request), rig.engine.submit(request)
    time.sleep(0.1)
    rig.runner.gate.set()
    outcomes = [future.exception(5) for future in (first, second)]
    assert outcomes[0] is None
    assert outcomes[1] is None or isinstance(outcomes[1], InvalidRequest)


def test_logits_that_overflow_fail_their_own_request_alone(make: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make()
    weights = tmp_path / "a1" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["base_model.model.classifier.bias"].fill_(3e38)
    safetensors.torch.save_file(tensors, weights)
    rig.runner.scale = 1.5
    for number in range(2):
        rig.engine.load(adapter_id(number)).result(5)
    rig.runner.gate.clear()
    rig.engine.submit(rig.request(0))
    time.sleep(0.1)
    good, bad = rig.engine.submit(rig.request(0)), rig.engine.submit(rig.request(1, (3, 4)))
    rig.runner.gate.set()
    with pytest.raises(AnswerNotFinite, match=r"default/a1@1.*inputs\[0\]"):
        bad.result(5)
    assert good.result(5).outputs[0].logits == (4.5, 5.25)
    assert rig.engine.submit(rig.request(0)).result(5)
