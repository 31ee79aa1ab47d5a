"""What a prompt shares with an earlier one is not computed again, and nobody's text shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.generation import Generated
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.types import AdapterId, Result
from tests.conformance.families import FAMILIES, Base, build_base
from tests.generation import GREEDY, Asking, GenerateOracle, adapter_id, make_generator, token_ids

BASE = AdapterId("default", "base", 1)
BLOCK_TOKENS = 8
INVOCATION = (7, 9)
PROMPTS = [[*range(5, 38), n] for n in range(3)] + [[*range(5, 20), *range(60, 80), n] for n in range(3)]
SHORT = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)


@dataclass(frozen=True)
class World:
    base: Base
    adapters: dict[str, Path]  # a, b: what they are called; a2: what replaces a; alora

    def runtime(self, *, prefix_cache: bool = True, num_bytes: int = 1 << 20) -> Runtime:
        return Runtime(
            self.base.folder,
            RuntimeSettings(
                num_threads=1,
                token_budget=16,
                kv_bytes=num_bytes,
                kv_block_tokens=BLOCK_TOKENS,
                prefix_cache=prefix_cache,
            ),
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("prefixes")
    base = build_base("llama", root, FAMILIES["llama"])
    options = {"lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    adapters = {
        name: make_generator(base.folder, root / name, seed=seed, r=4, **options)
        for seed, name in enumerate(("a", "b", "a2"))
    }
    adapters["alora"] = make_generator(
        base.folder, root / "alora", seed=9, r=4, alora_invocation_tokens=list(INVOCATION), **options
    )
    return World(base, adapters)


@pytest.fixture
def runtime(world: World) -> Iterator[Runtime]:
    with world.runtime() as runtime:
        for name in ("a", "b", "alora"):
            runtime.load(world.adapters[name], name=name)
        yield runtime


def num_cached(asking: Asking, adapter: AdapterId, prompt: Sequence[int], tenant: str | None = None) -> int:
    output = asking.submit(adapter, [prompt], SHORT, tenant=tenant)[1].result(60).outputs[0]
    assert isinstance(output, Generated)
    return output.num_cached_tokens


def replace(runtime: Runtime, name: str, folder: Path) -> None:
    """Another content under the same name and version."""
    runtime.engine.delete(adapter_id(name), force=True).result(60)
    runtime.load(folder, name=name)


def test_a_prefix_is_reused_by_the_same_content_of_the_same_tenant_alone(world: World, runtime: Runtime) -> None:
    asking, prompt = Asking(runtime.engine, world.base.folder), PROMPTS[0]
    assert num_cached(asking, adapter_id("a"), prompt) == 0
    assert num_cached(asking, adapter_id("a"), prompt) == 32, "all whole blocks but that of the last token"
    assert num_cached(asking, adapter_id("a"), PROMPTS[3]) == 8, "what both begin with"
    assert num_cached(asking, adapter_id("b"), prompt) == 0, "another adapter's keys and values"
    assert num_cached(asking, BASE, prompt) == 0
    assert num_cached(asking, adapter_id("a"), prompt, tenant="another") == 0
    replace(runtime, "a", world.adapters["a2"])
    assert num_cached(asking, adapter_id("a"), prompt) == 0, "another content under the name"
    replace(runtime, "a", world.adapters["a"])
    assert num_cached(asking, adapter_id("a"), prompt) == 32, "the first content again: its keys and values are right"


def test_an_alora_begins_with_the_bases_blocks_and_writes_what_peft_does(world: World, runtime: Runtime) -> None:
    asking = Asking(runtime.engine, world.base.folder)
    prompt = [*range(20, 50), *INVOCATION, 3, 4]
    num_cached(asking, BASE, prompt)
    want = GenerateOracle(world.base.folder, {"alora": world.adapters["alora"]}).generate(
        "alora", prompt, GREEDY.max_new_tokens
    )
    result = asking.submit(adapter_id("alora"), [prompt], GREEDY)[1].result(60)
    output = result.outputs[0]
    assert isinstance(output, Generated)
    assert output.num_cached_tokens == 24, "blocks that end before the invocation"
    assert token_ids(output.samples[0]) == want.tokens
    plain = prompt[:30]  # never invoked: the base's text, from the base's blocks
    assert asking.ask(adapter_id("alora"), plain).text == asking.ask(BASE, plain).text


@dataclass(frozen=True)
class Twins:
    """The same server with and without the cache; the one with it has room for a few prompts."""

    on: Runtime
    off: Runtime


@pytest.fixture(scope="module")
def twins(world: World) -> Iterator[Twins]:
    with world.runtime(num_bytes=46 << 10) as on, world.runtime(prefix_cache=False) as off:
        for runtime in (on, off):
            for name in ("a", "b", "alora"):
                runtime.load(world.adapters[name], name=name)
        yield Twins(on, off)
        stats = on.engine.generation_stats()
        assert stats is not None and stats.blocks.hit_tokens and stats.blocks.evictions, "no hit or no churn was seen"


asks = st.tuples(st.sampled_from(["a", "b", "alora", "base"]), st.integers(0, len(PROMPTS) - 1), st.booleans())


@given(steps=st.lists(st.one_of(asks, st.sampled_from(["a", "a2"])), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None)
def test_texts_are_the_same_with_and_without_the_cache(world: World, twins: Twins, steps: list[object]) -> None:
    """Several asks at once, prompts that begin alike, replaced adapters, and blocks that make room for others."""
    texts: list[list[str]] = []
    for runtime in (twins.on, twins.off):
        asking = Asking(runtime.engine, world.base.folder)
        found, open_requests = list[str](), list[Future[Result]]()
        for step in steps:
            if isinstance(step, str):
                found += [text_of(future) for future in open_requests]
                open_requests.clear()
                replace(runtime, "a", world.adapters[step])
                continue
            assert isinstance(step, tuple)
            name, which, invoked = step
            prompt = [*PROMPTS[which], *(INVOCATION if invoked else ())]
            owner = BASE if name == "base" else adapter_id(name)
            open_requests.append(asking.submit(owner, [prompt], SHORT)[1])
        texts.append(found + [text_of(future) for future in open_requests])
        runtime.engine.check_integrity()
    assert texts[0] == texts[1]


def text_of(future: Future[Result]) -> str:
    output = future.result(60).outputs[0]
    assert isinstance(output, Generated)
    return output.samples[0].text
