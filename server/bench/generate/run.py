"""Every part of the benchmark, checked and then measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import AdapterInfo, AdapterRef
from server.bench.generate.checks import Step, require_different, require_same
from server.bench.generate.others import (
    Memory,
    Prompts,
    generate_by_adapters,
    generate_greedily,
    make_adapters,
    weight_bytes,
)
from server.bench.generate.own import OwnEngine, steps_of, tokens_of
from server.bench.generate.plan import LONG_PROMPT_TOKENS, NUM_CHECKED, RANKS, GenerateBench
from server.bench.generate.rounds import Figures, Turn, quotient, speed, take_turns
from server.bench.generate.streams import Streams
from server.bench.generate.vllm_client import WAYS, Vllm
from server.bench.measure import Spread, describe_machine
from server.bench.texts import sample_texts

_NUM_TEXTS = 64  # joined, a prompt is the beginning of
_RATIOS = (
    ("own_mixed", "own_base"),
    ("own_one", "own_base"),
    ("own_mixed", "own_one"),
    ("own_base", "transformers_base"),
    ("own_base", "vllm_base"),
    ("own_mixed", "vllm_mixed"),
    ("own_one", "vllm_one"),
    ("vllm_mixed", "vllm_base"),
)
_SINGLE_RATIOS = (("own", "transformers"), ("own", "floor"))  # of speeds, so of times the other way round
_STREAM_RATIOS = {
    "first token, beside others ÷ alone": ("first_token_ms beside", "first_token_ms alone"),
    "p99 ÷ median, nobody arriving": ("gap_ms quiet p99", "gap_ms quiet p50"),
    "p99 ÷ median, a long prompt arriving": ("gap_ms arrival p99", "gap_ms arrival p50"),
}
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Site:
    """What all contenders share."""

    bench: GenerateBench
    runtime: Runtime
    own: OwnEngine
    base: AdapterInfo
    adapters: list[AdapterInfo]
    prompts: Prompts
    long_prompt: tuple[int, ...]
    adapted: Any  # PEFT's model of the base with every adapter

    @property
    def owners(self) -> list[int]:
        return [i % len(self.adapters) for i in range(len(self.prompts))]

    @property
    def mixed(self) -> list[AdapterInfo]:
        return [self.adapters[i] for i in self.owners]

    def of(self, info: AdapterInfo) -> list[AdapterInfo]:
        return [info] * len(self.prompts)


def run_generate_bench(bench: GenerateBench, progress: Progress) -> dict[str, Any]:
    """Measure and return the result as plain data; raises OutputsDiffer before any timing when a token is wrong.

    transformers computes in the engine's thread: a second computing thread would slow both (see Engine.call). Raises
    ContenderFailed where vLLM was asked for and does not run.
    """
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress(f"making {bench.num_adapters} adapters")
        with ThreadPoolExecutor(1) as making:  # its team of OpenMP threads ends with it
            adapted, folders = making.submit(make_adapters, bench.base, scratch, bench.num_adapters).result()
        runtime = stack.enter_context(Runtime(bench.base, _settings(bench, folders)))
        site = _make_site(bench, runtime, adapted, folders)
        progress("checking our tokens and those of transformers and PEFT")
        checked, base_steps, mixed_steps, plain = _check(site)
        vllm = None
        if bench.vllm_python is not None:
            progress("starting vLLM")
            vllm = stack.enter_context(Vllm(bench.vllm_python, bench.threads))
            vllm.start(bench.base, folders, site.owners, site.prompts, bench.new_tokens)
            checked |= _check_vllm(site, vllm, base_steps, mixed_steps)
        turns = _turns(site, plain, vllm)
        found = take_turns(turns, bench.rounds, lambda turn: progress(f"round {turn} of {bench.rounds}"))
        about = {"weight_bytes": weight_bytes(plain), "load_average": load, "checked": checked}
        return _result(site, found) | about | ({} if vllm is None else {"vllm": vllm.about})


def _settings(bench: GenerateBench, folders: Sequence[Path]) -> RuntimeSettings:
    """Room for every adapter, and no cache of prompts: they are the same ones in every round."""
    needed = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    arena_bytes = max(RuntimeSettings().arena_bytes, 2 * needed)
    return RuntimeSettings(arena_bytes=arena_bytes, num_threads=bench.threads, prefix_cache=False)


def _make_site(bench: GenerateBench, runtime: Runtime, adapted: Any, folders: Sequence[Path]) -> _Site:
    base = runtime.engine.catalogue.resolve(AdapterRef.parse("base"))
    adapters = [runtime.load(folder) for folder in folders]
    texts = sample_texts(_NUM_TEXTS + bench.requests)
    room = runtime.generation_for(base).max_length - 1

    def prompt(i: int, num_tokens: int) -> tuple[int, ...]:
        text = " ".join(texts[i : i + _NUM_TEXTS])
        return runtime.encoder.encode([(text, None)], max_length=num_tokens, truncate=True)[0].input_ids

    prompts = [prompt(i, bench.prompt_tokens) for i in range(bench.requests)]
    long_prompt = prompt(bench.requests, min(LONG_PROMPT_TOKENS, room))
    own = OwnEngine(runtime, bench.new_tokens)
    return _Site(bench, runtime, own, base, adapters, prompts, long_prompt, adapted)


def _check(site: _Site) -> tuple[dict[str, int], list[list[Step]], list[list[Step]], Any]:
    """Texts that part at a near tie, by comparison; the references of vLLM; and the base as transformers has it."""
    own, count, call = site.own, min(NUM_CHECKED, len(site.adapters), len(site.prompts)), site.runtime.engine.call
    some, num = site.prompts[:count], site.bench.new_tokens
    of_peft = call(lambda: generate_by_adapters(site.adapted, some, num))
    plain = site.adapted.unload()
    of_base = call(lambda: generate_greedily(plain, site.prompts, num, with_steps=True)).steps
    base = [tokens_of(sample) for sample in own.generate(site.of(site.base), site.prompts)]
    mixed = [steps_of(sample) for sample in own.generate(site.mixed, site.prompts, logprobs=2)]
    mixed_tokens = [[step.token for step in steps] for steps in mixed[:count]]
    alone = [
        tokens_of(own.generate([info], [prompt])[0]) for info, prompt in zip(site.adapters[:count], some, strict=True)
    ]
    for i in range(count):
        require_different(f"adapter {i}", mixed_tokens[i], base[i])
    return (
        {
            "our base, transformers'": require_same("our base", base, of_base),
            "our adapters mixed, PEFT's": require_same("our adapters", mixed_tokens, of_peft),
            "our adapters alone, mixed": require_same("an adapter alone and in a batch", alone, mixed[:count]),
        },
        of_base,
        mixed,
        plain,
    )


def _check_vllm(site: _Site, vllm: Vllm, base: list[list[Step]], mixed: list[list[Step]]) -> dict[str, int]:
    one = [steps_of(sample) for sample in site.own.generate(site.of(site.adapters[0]), site.prompts, logprobs=2)]
    wanted = {"base": base, "mixed": mixed, "one": one}
    return {f"vLLM's {way}, ours": require_same(f"vLLM, {way}", vllm.run(way), wanted[way]) for way in WAYS}


def _turns(site: _Site, plain: Any, vllm: Vllm | None) -> list[Turn]:
    """Every contender."""
    bench, own, prompts, call = site.bench, site.own, site.prompts, site.runtime.engine.call
    num_tokens = bench.requests * bench.new_tokens
    memory, num_bytes = Memory(), weight_bytes(plain)
    streams = Streams(own, site.mixed, prompts, site.long_prompt, max(1, bench.new_tokens // 2))

    def vllm_turn(way: str, vllm: Vllm) -> Turn:
        return speed(f"vllm_{way}", num_tokens, lambda: vllm.run(way))

    def floor() -> Figures:
        speed = call(memory.bytes_per_second)
        return {"bytes_per_second": speed, "ms floor": 1e3 * num_bytes / speed}

    return [
        speed("own_base", num_tokens, lambda: own.generate(site.of(site.base), prompts)),
        speed("own_mixed", num_tokens, lambda: own.generate(site.mixed, prompts)),
        speed("own_one", num_tokens, lambda: own.generate(site.of(site.adapters[0]), prompts)),
        speed(
            "transformers_base", num_tokens, lambda: call(lambda: generate_greedily(plain, prompts, bench.new_tokens))
        ),
        *([] if vllm is None else [vllm_turn(way, vllm) for way in WAYS]),
        lambda: {"ms own": own.ms_per_token(site.base, prompts[0])},
        lambda: {"ms transformers": call(lambda: generate_greedily(plain, prompts[:1], bench.new_tokens).ms_per_token)},
        floor,
        streams.first_token_alone,
        streams.first_token_beside,
        streams.gaps_quiet,
        streams.gaps_arrival,
    ]


def _result(site: _Site, found: dict[str, list[float]]) -> dict[str, Any]:
    def spreads(prefix: str) -> dict[str, dict[str, float]]:
        return {
            name.removeprefix(prefix): asdict(Spread.of(values))
            for name, values in found.items()
            if name.startswith(prefix)
        }

    ratios = {f"{a} / {b}": quotient(found, a, b) for a, b in _RATIOS if a in found and b in found}
    ratios |= {f"single stream, {a} / {b}": quotient(found, f"ms {b}", f"ms {a}") for a, b in _SINGLE_RATIOS}
    streaming = {name: quotient(found, above, below) for name, (above, below) in _STREAM_RATIOS.items()}
    settings = {name: value for name, value in asdict(site.bench).items() if name not in ("base", "vllm_python")}
    contenders = [name for name in found if name.partition("_")[0] in ("own", "transformers", "vllm")]
    return {
        "benchmark": "generate",
        "base": site.runtime.base_name,
        "settings": settings | {"ranks": list(RANKS), "token_budget": RuntimeSettings().token_budget},
        "long_prompt_tokens": len(site.long_prompt),
        "machine": describe_machine(),
        "tokens_per_second": {name: asdict(Spread.of(found[name])) for name in contenders},
        "ms_per_token": spreads("ms "),
        "bytes_per_second": asdict(Spread.of(found["bytes_per_second"])),
        "first_token_ms": spreads("first_token_ms "),
        "gap_ms": spreads("gap_ms "),
        "ratios": {name: asdict(spread) for name, spread in ratios.items()},
        "streaming_ratios": {name: asdict(spread) for name, spread in streaming.items()},
        "rounds": found,
    }
