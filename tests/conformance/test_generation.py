"""Greedy texts of many adapters at once equal transformers' `generate` with each adapter alone, token for token."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_runtime.kv_blocks import block_bytes
from lora_runtime.model.load import load_base
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import AdapterId
from tests.conformance.families import FAMILIES, Base, Family, build_base
from tests.generation import GREEDY, Asking, GenerateOracle, Wanted, adapter_id, make_generator, samples_of, token_ids
from tests.gguf_files import dequantised, packaged_smollm2

_LLAMA = FAMILIES["llama"]
_GEMMA = {
    **_LLAMA.config, "tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0,
}  # fmt: skip
GENERATORS = {name: FAMILIES[name] for name in ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gpt-neox", "gemma3")} | {
    "gemma": Family(
        "GemmaForCausalLM", {**_LLAMA.config, "tie_word_embeddings": True}, _LLAMA.attention, _LLAMA.linears,
        "embed_tokens", _LLAMA.tokenizer, is_decoder=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", _GEMMA, _LLAMA.attention, _LLAMA.linears, "embed_tokens", _LLAMA.tokenizer,
        is_decoder=True,
    ),
}  # fmt: skip
RANKS = (1, 3, 8, 16)
BASE = AdapterId("default", "base", 1)
BLOCK_TOKENS = 8
ALL_REQUESTS = ("gpt2", "llama", "qwen2", "gemma")
BOTH_WAYS = "gpt2"  # with the prefix cache and steps in turn, and without and each step planned ahead
NUM_ADAPTERS, NUM_REQUESTS, NUM_POSITIONS = 16, 32, 96


@dataclass(frozen=True)
class World:
    base: Base
    adapters: dict[str, Path]
    oracle: GenerateOracle
    num_positions: int = NUM_POSITIONS
    known: dict[tuple[str | None, tuple[int, ...]], Wanted] = field(default_factory=dict)

    def want(self, owner: str | None, prompt: list[int]) -> Wanted:
        """What transformers generates, up to the end of the context."""
        key = owner, tuple(prompt)
        if key not in self.known:
            num_new = min(GREEDY.max_new_tokens, self.num_positions - len(prompt))
            self.known[key] = self.oracle.generate(owner, prompt, num_new)
        return self.known[key]


def _families() -> list[Any]:
    """The others are slow: their architectures are variations of these."""
    marks = {name: () if name in ALL_REQUESTS else (pytest.mark.slow,) for name in GENERATORS}
    return [pytest.param(name, marks=marks[name]) for name in sorted(GENERATORS)]


@pytest.fixture(scope="module", params=_families())
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("generation")
    base = build_base(request.param, root, GENERATORS[request.param])
    family = base.family
    adapters: dict[str, Path] = {}
    for n in range(NUM_ADAPTERS if request.param in ALL_REQUESTS else NUM_ADAPTERS // 2):
        targets = list(family.linears if n % 2 else family.attention)
        if n == 5:
            targets.append("lm_head" if hasattr(family, "words") and request.param != "gpt-neox" else "embed_out")
        adapters[f"a{n}"] = make_generator(
            base.folder, root / f"a{n}", seed=n, r=RANKS[n % 4], lora_alpha=2 * RANKS[n % 4], target_modules=targets,
            fan_in_fan_out=family.fan_in_fan_out,
        )  # fmt: skip
    return World(base, adapters, GenerateOracle(base.folder, adapters))


def draw_prompts(base: Base, count: int) -> list[list[int]]:
    """Prompts of up to 60 tokens, some of which begin alike."""
    generator = random.Random(3)
    shared = [generator.randrange(1, base.vocab_size) for _ in range(40)]
    prompts: list[list[int]] = []
    for n in range(count):
        own = [generator.randrange(1, base.vocab_size) for _ in range(generator.randint(1, 20))]
        prompts.append((shared if n // 2 % 3 == 0 else []) + own)
    return prompts


def test_texts_of_many_adapters_at_once_are_those_of_each_alone(world: World) -> None:
    num_requests = NUM_REQUESTS if world.base.name in ALL_REQUESTS else NUM_REQUESTS // 2
    prompts = draw_prompts(world.base, num_requests)
    owners = [None if n // 2 % 8 == 7 else f"a{n // 2}" for n in range(num_requests)]
    for prefix_cache in (True, False) if world.base.name == BOTH_WAYS else (True,):
        settings = RuntimeSettings(
            num_threads=1,
            token_budget=24,
            kv_bytes=kv_bytes(world, num_blocks=30),
            kv_block_tokens=BLOCK_TOKENS,
            prefix_cache=prefix_cache,
            run_ahead=not prefix_cache or world.base.name != BOTH_WAYS,
        )
        check_texts(world, settings, owners, prompts, [0])


def test_another_adapters_text_is_noticed(world: World) -> None:
    """The comparison above can fail: two adapters write different texts for one prompt."""
    prompt = draw_prompts(world.base, 1)[0]
    texts = {tuple(world.oracle.generate(f"a{n}", prompt, 12).tokens) for n in range(4)}
    assert len(texts) > 1


def kv_bytes(world: World, num_blocks: int) -> int:
    """What so many blocks take."""
    kv = load_base(world.base.folder, prepack=False).kv
    assert kv is not None
    return num_blocks * block_bytes(kv, BLOCK_TOKENS)


def check_texts(
    world: World, settings: RuntimeSettings, owners: list[str | None], prompts: list[list[int]], ends: list[int]
) -> None:
    """Ask for all texts, some of them later than others, and compare each with transformers'."""
    with Runtime(world.base.folder, settings) as runtime:
        for name, folder in world.adapters.items():
            runtime.load(folder, name=name)
        asking = Asking(runtime.engine, world.base.folder, eos_token_ids=ends)
        asked = []
        for n, (owner, prompt) in enumerate(zip(owners, prompts, strict=True)):
            asked.append(asking.submit(BASE if owner is None else adapter_id(owner), [prompt]))
            time.sleep(0.01 if n % 4 == 0 else 0)
        results = [future.result(300) for _, future in asked]
        before = runtime.engine.generation_stats()
        for _ in range(2):  # once more each after the other, so that the second finds the first one's blocks
            asked.append(asking.submit(BASE if owners[0] is None else adapter_id(owners[0]), [prompts[0]]))
            results.append(asked[-1][1].result(300))
        stats = runtime.engine.generation_stats()
        runtime.engine.check_integrity()
    assert before is not None and before.num_preempted > 0, "nothing was preempted, so nothing is shown of it"
    assert stats is not None and stats.num_begun == 0 and stats.blocks.num_used == 0
    hits = stats.blocks.hit_tokens - before.blocks.hit_tokens
    assert hits > 0 if settings.prefix_cache else hits == 0
    owners, prompts = [*owners, owners[0], owners[0]], [*prompts, prompts[0], prompts[0]]
    for owner, prompt, result, (name, _) in zip(owners, prompts, results, asked, strict=True):
        (sample,) = samples_of(result)
        want = world.want(owner, prompt)
        assert token_ids(sample) == want.tokens, f"{world.base.name}: another text by {owner}"
        logprobs = [token.logprob for token in sample.tokens]
        assert logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert "".join(delta.text for delta in asking.deltas[name]) == sample.text


@pytest.mark.slow
def test_a_real_model_writes_what_transformers_does(tmp_path: Path) -> None:
    """SmolLM2-135M in fp32, 32 requests of 15 adapters and the base, more than the cache holds at once."""
    folder = dequantised(packaged_smollm2(), tmp_path / "base")
    adapters = {
        f"a{n}": make_generator(
            folder, tmp_path / f"a{n}", seed=n, r=RANKS[n % 4], lora_alpha=1, target_modules=list(_LLAMA.linears)
        )
        for n in range(15)
    }
    base = Base("smollm2", _LLAMA, folder, (), vocab_size=40_000)
    world = World(base, adapters, GenerateOracle(folder, adapters), num_positions=8192)
    owners = [None if n // 2 == 15 else f"a{n // 2}" for n in range(NUM_REQUESTS)]
    settings = RuntimeSettings(
        num_threads=2, token_budget=48, kv_bytes=kv_bytes(world, num_blocks=60), kv_block_tokens=BLOCK_TOKENS
    )
    check_texts(world, settings, owners, draw_prompts(base, NUM_REQUESTS), [2])
