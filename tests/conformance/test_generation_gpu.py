"""Generation on a GPU: exact in fp32, and in bf16 by captured steps that are launched ahead, right up to rounding."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_runtime.errors import RequestCancelled
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.sampling.params import SamplingParams
from tests.conformance.families import FAMILIES, Base, build_base
from tests.conformance.test_generation import (
    BASE,
    BLOCK_TOKENS,
    GENERATORS,
    World,
    check_texts,
    draw_prompts,
    kv_bytes,
)
from tests.generation import Asking, GenerateOracle, adapter_id, make_generator, samples_of, token_ids

pytestmark = pytest.mark.gpu
NUM_ADAPTERS = 6
RANKS = (4, 8, 16)
MEAN_ERROR = 0.05  # of a log-probability in bf16


def make_world(name: str, root: Path, **config: int) -> World:
    family = replace(GENERATORS[name], config={**FAMILIES[name].config, **config})
    base = build_base(name, root, family)
    adapters = {
        f"a{n}": make_generator(
            base.folder, root / f"a{n}", seed=n, r=RANKS[n % 3], lora_alpha=RANKS[n % 3],
            target_modules=list(family.linears if n % 2 else family.attention), fan_in_fan_out=family.fan_in_fan_out,
        )
        for n in range(NUM_ADAPTERS)
    }  # fmt: skip
    return World(base, adapters, GenerateOracle(base.folder, adapters))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_in_fp32_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    world = make_world(name, tmp_path)
    prompts = draw_prompts(world.base, 16)
    owners = [None if n % 8 == 7 else f"a{n % NUM_ADAPTERS}" for n in range(16)]
    settings = RuntimeSettings(
        token_budget=24, kv_bytes=kv_bytes(world, 30), kv_block_tokens=BLOCK_TOKENS, device="cuda",
        arena_bytes=64 << 20, host_bytes=64 << 20,
    )  # fmt: skip
    check_texts(world, settings, owners, prompts, [0])


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> World:
    """With heads that torch's packed attention takes."""
    return make_world("llama", tmp_path_factory.mktemp("halved"), hidden_size=64, head_dim=16)


@pytest.fixture(scope="module")
def runtime(halved: World) -> Iterator[Runtime]:
    settings = RuntimeSettings(
        device="cuda", dtype="bfloat16", token_budget=64, kv_bytes=64 << 20, arena_bytes=64 << 20, host_bytes=64 << 20
    )
    with Runtime(halved.base.folder, settings) as runtime:
        for name, folder in halved.adapters.items():
            runtime.load(folder, name=name)
        runtime.warm_up()
        yield runtime


def mean_error(world: World, owner: str | None, prompt: list[int], tokens: list[int], logprobs: list[float]) -> float:
    """Mean absolute difference of the tokens' log-probabilities from the model's in fp32 for the same text."""
    model = world.oracle.model
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        if owner is None:
            with model.disable_adapter():
                logits = model(input_ids=ids).logits[0]
        else:
            model.set_adapter(owner)
            logits = model(input_ids=ids).logits[0]
    scores = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    wanted = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((wanted - torch.tensor(logprobs)).abs().mean())


def test_texts_in_bf16_come_from_captured_steps_and_are_their_adapters_own(runtime: Runtime, halved: World) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=24, logprobs=0, ignore_eos=True)
    asking = Asking(runtime.engine, halved.base.folder)
    prompts = draw_prompts(halved.base, 24)
    owners = [None if n % 8 == 7 else f"a{n % NUM_ADAPTERS}" for n in range(24)]
    before = runtime.stats()
    asked = [
        asking.submit(BASE if owner is None else adapter_id(owner), [prompt], params)[1]
        for owner, prompt in zip(owners, prompts, strict=True)
    ]
    samples = [samples_of(future.result(120))[0] for future in asked]
    after = runtime.stats()
    assert after.replayed_steps - before.replayed_steps >= 12, after.eager_steps
    assert after.num_compiled == before.num_compiled, "a step had to wait for a compiler"
    errors: list[float] = []
    others: list[float] = []
    for owner, prompt, sample in zip(owners, prompts, samples, strict=True):
        logprobs = [token.logprob for token in sample.tokens if token.logprob is not None]
        errors.append(mean_error(halved, owner, prompt, token_ids(sample), logprobs))
        another = "a0" if owner != "a0" else "a1"
        others.append(mean_error(halved, another, prompt, token_ids(sample), logprobs))
    assert sum(errors) / len(errors) < MEAN_ERROR, errors
    assert max(errors) < min(others), "another adapter's texts would pass"


def test_requests_that_end_early_leave_nothing(runtime: Runtime, halved: World) -> None:
    draw, base = random.Random(5), halved.base
    asking = Asking(runtime.engine, base.folder)
    futures = []
    for n in range(300):
        params = SamplingParams(temperature=1.0, max_new_tokens=draw.randint(1, 20), top_p=draw.choice((1.0, 0.9)))
        owner = adapter_id(f"a{n % NUM_ADAPTERS}") if n % 3 else BASE
        name, future = asking.submit(owner, [_prompt(draw, base)], params, tenant=f"t{n % 3}")
        futures.append(future)
        if draw.random() < 0.5:
            threading.Timer(draw.random(), runtime.engine.cancel, [name]).start()
    for future in futures:
        future.exception(120)
    assert any(future.exception() is None for future in futures)
    assert any(isinstance(future.exception(), RequestCancelled) for future in futures)
    runtime.engine.check_integrity()
    stats = runtime.engine.generation_stats()
    assert stats is not None and stats.num_begun == 0 and stats.blocks.num_used == 0


def _prompt(draw: random.Random, base: Base) -> list[int]:
    return [draw.randrange(1, base.vocab_size) for _ in range(draw.randint(1, 40))]
