"""What goes wrong around a text goes wrong for its request alone, and everything is given back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lora_runtime.errors import InvalidRequest, MultiloraError, RequestCancelled, TextTooLong
from lora_runtime.generation import Delta, Generation
from lora_runtime.model.launched import LaunchedBatch
from lora_runtime.model.runner import PackedRunner
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.types import AdapterId, Request, Task, TokenSequence
from tests.conformance.families import FAMILIES, Base, build_base
from tests.generation import Asking, adapter_id, make_generator, samples_of, token_ids

BASE = AdapterId("default", "base", 1)
LONG = SamplingParams(temperature=0.0, max_new_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return build_base("llama", tmp_path_factory.mktemp("base"), FAMILIES["llama"])


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    return make_generator(base.folder, folder, seed=1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def runtime(request: pytest.FixtureRequest, base: Base, adapter: Path) -> Iterator[Runtime]:
    ahead: bool = request.param
    settings = RuntimeSettings(num_threads=1, token_budget=32, kv_bytes=256 << 10, kv_block_tokens=8, run_ahead=ahead)
    with Runtime(base.folder, settings) as runtime:
        runtime.load(adapter, name="a")
        yield runtime
        assert_given_back(runtime)


def assert_given_back(runtime: Runtime) -> None:
    runtime.engine.check_integrity()
    stats = runtime.engine.generation_stats()
    assert stats is not None and stats.num_begun == 0 and stats.blocks.num_used == 0


class Panic(BaseException):
    """Such as Rust's, which is no Exception."""


class BrokenText:
    def __init__(self, after: int) -> None:
        self._left = after

    def append(self, token_id: int) -> str:
        del token_id
        self._left -= 1
        if self._left < 0:
            raise Panic("no")
        return "x"

    def flush(self) -> str:
        return ""


def never() -> NoReturn:
    raise Panic("no")


@pytest.mark.parametrize("how", ["start", "token", "delta", "mask"])
def test_a_text_that_breaks_fails_its_request_alone(runtime: Runtime, base: Base, how: str) -> None:
    asking = Asking(runtime.engine, base.folder)
    _, beside = asking.submit(BASE, [[5, 6, 7]], LONG)

    def on_delta(_: Delta) -> None:
        if how == "delta":
            raise Panic("no")

    generation = Generation(
        LONG.seeded(),
        never if how == "start" else lambda: BrokenText(2 if how == "token" else 99),
        on_delta=on_delta,
    )
    if how == "mask":
        generation = Generation(SamplingParams(temperature=0.0).seeded(), lambda: BrokenText(9), new_mask=never)
    prompts = (TokenSequence((5, 6), None), TokenSequence((7, 8, 9), None))
    future = runtime.engine.submit(Request("broken", adapter_id("a"), Task.GENERATE, prompts, generation=generation))
    with pytest.raises(MultiloraError, match="generation failed: Panic"):
        future.result(30)
    assert len(token_ids(samples_of(beside.result(30))[0])) == 60


def test_a_thousand_requests_that_end_early_leave_nothing(runtime: Runtime, base: Base) -> None:
    """Cancelled at any time, past their deadline, or ended by themselves; more at once than the cache holds."""
    draw = random.Random(7)
    asking = Asking(runtime.engine, base.folder)
    futures = []
    for n in range(1000):
        prompt = [draw.randrange(1, base.vocab_size) for _ in range(draw.randint(1, 40))]
        params = SamplingParams(temperature=1.0, max_new_tokens=draw.randint(1, 20), n=draw.choice((1, 1, 2)))
        deadline = time.monotonic() + draw.random() if draw.random() < 0.3 else None
        owner = adapter_id("a") if n % 2 else BASE
        name, future = asking.submit(owner, [prompt], params, deadline_monotonic=deadline, tenant=f"t{n % 3}")
        futures.append(future)
        if draw.random() < 0.5:
            threading.Timer(draw.random() * 2, runtime.engine.cancel, [name]).start()
        if n % 50 == 0:
            time.sleep(0.02)
    for future in futures:
        future.exception(120)
    ended = [future for future in futures if future.exception() is None]
    cancelled = [future for future in futures if isinstance(future.exception(), RequestCancelled)]
    assert ended and cancelled, "nothing is shown of either"


def test_samples_part_at_the_end_of_their_prompt(runtime: Runtime, base: Base) -> None:
    """Each is the text that the same seed gives whatever is beside it, and the prompt is computed once."""
    asking = Asking(runtime.engine, base.folder)
    params = SamplingParams(temperature=1.0, seed=3, max_new_tokens=30, n=4, ignore_eos=True)
    prompt = list(range(5, 42))
    alone = samples_of(asking.submit(adapter_id("a"), [prompt], params)[1].result(60))
    _, beside = asking.submit(BASE, [prompt], LONG)
    again = samples_of(asking.submit(adapter_id("a"), [prompt], params)[1].result(60))
    beside.result(60)
    assert [token_ids(sample) for sample in alone] == [token_ids(sample) for sample in again]
    assert len({tuple(token_ids(sample)) for sample in alone}) == 4
    assert all(sample.finish_reason is FinishReason.LENGTH for sample in alone)


def test_a_text_ends_where_the_context_does(runtime: Runtime, base: Base) -> None:
    asking = Asking(runtime.engine, base.folder)
    sample = asking.ask(BASE, [5] * 90, LONG)
    assert (len(sample.tokens), sample.finish_reason) == (6, FinishReason.LENGTH)
    with pytest.raises(TextTooLong, match="96 tokens"):
        asking.ask(BASE, [5] * 96, LONG)


def test_more_samples_than_run_at_once_are_refused(runtime: Runtime, base: Base) -> None:
    with pytest.raises(InvalidRequest, match="17 is above 16"):
        Asking(runtime.engine, base.folder).ask(BASE, [5], SamplingParams(n=17))


@pytest.mark.parametrize(
    ("field", "params"),
    [("ignore_eos", SamplingParams(ignore_eos=True)), ("min_new_tokens", SamplingParams(min_new_tokens=1))],
)
def test_a_constraint_alone_says_where_its_text_ends(runtime: Runtime, field: str, params: SamplingParams) -> None:
    generation = Generation(params.seeded(), lambda: BrokenText(9), new_mask=never)
    prompt = (TokenSequence((5, 6), None),)
    future = runtime.engine.submit(Request("both", BASE, Task.GENERATE, prompt, generation=generation))
    with pytest.raises(InvalidRequest, match=field):
        future.result(30)


def test_a_tenant_with_little_to_ask_begins_while_another_fills_every_place(runtime: Runtime, base: Base) -> None:
    asking = Asking(runtime.engine, base.folder)
    many = [asking.submit(BASE, [[5, 6, n % 90 + 1]], LONG, tenant="many")[1] for n in range(60)]
    time.sleep(0.3)
    few = asking.submit(adapter_id("a"), [[7, 8]], SamplingParams(temperature=0.0, max_new_tokens=3), tenant="few")[1]
    few.result(60)
    assert sum(future.done() for future in many) < 30, "it waited for most of the other tenant's"
    for future in many:
        future.result(120)


def test_an_adapter_that_is_unloaded_ends_its_texts_first_and_holds_up_no_other(runtime: Runtime, base: Base) -> None:
    asking = Asking(runtime.engine, base.folder)
    name, running = asking.submit(adapter_id("a"), [[5, 6, 7]], LONG)
    while not asking.deltas[name]:
        time.sleep(0.001)
    _, queued = asking.submit(adapter_id("a"), [[8, 9]], LONG)
    unloaded = runtime.engine.unload(adapter_id("a"))
    assert len(asking.ask(BASE, [5, 6], SamplingParams(temperature=0.0, max_new_tokens=2)).tokens) == 2
    assert len(samples_of(running.result(60))[0].tokens) == 60
    unloaded.result(60)
    assert len(samples_of(queued.result(60))[0].tokens) == 60, "it was loaded again for those who waited"


def test_an_adapter_that_waits_for_room_gets_its_turn_while_another_is_asked_without_end(
    runtime: Runtime, base: Base, adapter: Path, tmp_path: Path
) -> None:
    other = make_generator(base.folder, tmp_path / "b", seed=2, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    size = runtime.engine.catalogue.get(adapter_id("a")).resident_bytes
    settings = RuntimeSettings(num_threads=1, token_budget=32, kv_bytes=256 << 10, arena_bytes=int(1.5 * size))
    with Runtime(base.folder, settings) as small:
        small.load(adapter, name="a")
        small.engine.register(adapter_id("b"), other).result(30)
        asking, stop = Asking(small.engine, base.folder), threading.Event()

        def ask_on() -> None:
            while not stop.is_set():
                asking.ask(adapter_id("a"), [5, 6], LONG)

        clients = [threading.Thread(target=ask_on) for _ in range(3)]
        for client in clients:
            client.start()
        try:
            time.sleep(0.3)
            assert (
                len(asking.ask(adapter_id("b"), [7, 8], SamplingParams(temperature=0.0, max_new_tokens=3)).tokens) == 3
            )
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert_given_back(small)


def test_a_tenant_with_little_to_ask_begins_while_anothers_long_texts_fill_the_cache(base: Base) -> None:
    """Long enough for a few to fill it: it is blocks that are shared out, not places."""
    settings = RuntimeSettings(num_threads=1, token_budget=32, kv_bytes=64 << 10, kv_block_tokens=8)
    with Runtime(base.folder, settings) as runtime:
        asking = Asking(runtime.engine, base.folder)
        params = SamplingParams(temperature=0.0, max_new_tokens=50, ignore_eos=True)
        names, many = zip(
            *(asking.submit(BASE, [[n + 1, *range(5, 44)]], params, tenant="many") for n in range(8)), strict=True
        )
        while len(asking.deltas[names[0]]) < 30:
            time.sleep(0.001)
        few = asking.submit(BASE, [range(30, 86)], SamplingParams(temperature=0.0, max_new_tokens=2), tenant="few")[1]
        few.result(60)
        assert not any(future.done() for future in many), "it waited for one of the other tenant's"
        assert all(len(samples_of(future.result(120))[0].tokens) == 50 for future in many)
        assert_given_back(runtime)


@pytest.mark.parametrize("where", ["launch", "draw", "answers"])
def test_a_step_that_fails_is_made_again_and_the_texts_are_the_same(
    runtime: Runtime, base: Base, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """With the next step under way or not: it is planned anew from what is known then."""
    asking = Asking(runtime.engine, base.folder)
    want = [token_ids(asking.ask(owner, [5, 6, 7], LONG)) for owner in (BASE, adapter_id("a"))]
    count = 0

    def fails_sometimes(wrapped: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count in (5, 20):
                raise RuntimeError("the device is gone for a moment")
            return wrapped(*args, **more)

        return call

    target = PackedRunner if where == "launch" else LaunchedBatch
    monkeypatch.setattr(target, where, fails_sometimes(getattr(target, where)))
    asked = [asking.submit(owner, [[5, 6, 7]], LONG)[1] for owner in (BASE, adapter_id("a"))]
    assert [token_ids(samples_of(future.result(60))[0]) for future in asked] == want
    assert count > 20
