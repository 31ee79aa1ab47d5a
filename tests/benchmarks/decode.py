"""Texts under way, each with its own adapter, through the whole engine: `python -m tests.benchmarks.decode`.

Bases of random weights in the shapes of known decoders. What is timed is the time between all texts' first token and
the first text's last: every step then continues every text by one token. No figure is told before the texts of adapters
in a mixed batch are those that each adapter gives alone, up to near ties.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from lora_runtime.generation import Sample
from lora_runtime.kv_blocks import KvConfig
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import AdapterInfo, AdapterRef
from server.bench.generate.checks import require_different
from server.bench.generate.others import cache_name, weight_bytes
from server.bench.generate.own import OwnEngine, sample_of, tokens_of
from server.bench.generate.rounds import take_turns
from server.bench.measure import OutputsDiffer, Spread
from tests.benchmarks.decode_problem import (
    DECODERS,
    MAX_CONTEXT,
    random_prompts,
    save_adapter,
    save_base,
)
from tests.benchmarks.kernels import machine_of
from tests.benchmarks.result_file import write_result

NEAR_TIES = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.15}  # between a token's logit and the best
_CHECKED_TOKENS = 24
_NUM_CHECKED = 4
_NUM_BEST = 8  # tokens that are told for each token of the reference
_GRAPH_BYTES = 4 << 30
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """What is measured."""

    shape: str
    targets: str = "all"
    rank: int = 16
    texts: int = 32  # at once, each with an adapter of its own
    contexts: tuple[int, ...] = (128, 1024)  # tokens of each text, on average while it is timed
    new_tokens: int = 64
    rounds: int = 5
    device: str = "cuda"
    dtype: str = "bfloat16"
    threads: int = 8
    scratch: str | None = None  # folder for the base and the adapters; memory-backed is fastest


def run_decode_bench(bench: DecodeBench, progress: Progress) -> dict[str, Any]:
    """Measure and return the result as plain data; raises OutputsDiffer before any timing when a token is wrong."""
    load = os.getloadavg()[0]
    device, dtype = torch.device(bench.device), getattr(torch, bench.dtype)
    decoder = DECODERS[bench.shape]
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        base, marks = Path(scratch) / "base", _Marks(progress)
        kv = _kv(save_base(decoder, base, device, dtype), dtype)
        folders = [Path(scratch) / f"a{i}" for i in range(bench.texts)]
        sizes = [
            save_adapter(base, folder, decoder.targets[bench.targets], bench.rank, device, i)
            for i, folder in enumerate(folders)
        ]
        marks("folders written")
        with Runtime(base, _settings(bench, kv, sum(sizes))) as runtime:
            marks("base loaded")
            adapters = [runtime.load(folder) for folder in folders]
            marks("adapters loaded")
            runtime.warm_up()
            marks("warmed up")
            about = {"start_seconds": dict(marks.seconds), "graphs": runtime.stats().num_graphs}
            plain = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype).to(device).eval()
            cases = [_run_case(bench, runtime, adapters, plain, context, progress) for context in bench.contexts]
            weights = weight_bytes(plain)
    machine = machine_of(device)
    for case in cases:
        kv_bytes = bench.texts * case["context"] * kv.token_bytes
        case["bytes"] = {"weights": weights, "kv": kv_bytes, "adapters": sum(sizes)}
        case["share_of_ceiling"] = _share(case)
    return {
        "benchmark": "decode",
        "settings": {key: value for key, value in asdict(bench).items() if key != "scratch"},
        "machine": machine,
        "load_average": load,
        "better": "higher",
        "ratios": {f"{case['name']}: {pair}": spread for case in cases for pair, spread in case.pop("ratios").items()},
        "cases": cases,
    } | about


class _Marks:
    """Seconds of each part of the start."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what], self._last = now - self._last, now
        self._progress(f"{what}: {self.seconds[what]:.1f} s")


def _kv(config: Any, dtype: torch.dtype) -> KvConfig:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    return KvConfig(config.num_hidden_layers, heads, width, dtype.itemsize)


def _settings(bench: DecodeBench, kv: KvConfig, adapter_bytes: int) -> RuntimeSettings:
    """Room for every adapter and every text; no cache of prompts: they are the same ones in every round."""
    context = max(bench.contexts) + bench.new_tokens + 512  # whole blocks
    return RuntimeSettings(
        arena_bytes=int(1.2 * adapter_bytes) + (64 << 20),
        host_bytes=int(1.2 * adapter_bytes) + (64 << 20),
        kv_bytes=bench.texts * context * kv.token_bytes,
        token_budget=2048,
        beside_tokens=2048,
        graph_bytes=_GRAPH_BYTES,
        num_threads=bench.threads,
        prefix_cache=False,
        device=bench.device,
        dtype=bench.dtype,
    )


def _run_case(
    bench: DecodeBench,
    runtime: Runtime,
    adapters: Sequence[AdapterInfo],
    plain: Any,
    context: int,
    progress: Progress,
) -> dict[str, Any]:
    base = runtime.engine.catalogue.resolve(AdapterRef.parse("base"))
    prompts = random_prompts(bench.texts, context - bench.new_tokens // 2, plain.config.vocab_size)
    parted = _check(bench, runtime, [base, *adapters], prompts)
    before = runtime.stats()
    batches = {
        "base": ([base] * bench.texts, prompts),
        "one": ([adapters[0]] * bench.texts, prompts),
        "mixed": ([*adapters], prompts),
        "single base": ([base], prompts[:1]),
        "single adapter": ([adapters[0]], prompts[:1]),
    }
    own = OwnEngine(runtime, bench.new_tokens)
    turns = [partial(_decode, own, name, infos, texts) for name, (infos, texts) in batches.items()]
    for name, texts in (("transformers", prompts), ("single transformers", prompts[:1])):
        turns.append(partial(_plain, runtime, plain, name, texts, bench.new_tokens))
    found = take_turns(turns, bench.rounds, lambda _: None)
    after = runtime.stats()
    spreads = {name: Spread.of(values) for name, values in found.items()}
    name = f"{bench.shape}, {bench.texts} texts, context {context}"
    progress(f"{name}: " + ", ".join(f"{key} {spread.median:.3f} ms" for key, spread in spreads.items()))
    pairs = [("base", "mixed"), ("base", "one"), ("one", "mixed"), ("single base", "single adapter")]
    pairs += [("transformers", "base"), ("single transformers", "single base")]
    return {
        "name": name,
        "context": context,
        "parted_at_near_ties": parted,
        "ms_per_step": {key: asdict(spread) for key, spread in spreads.items()},
        "replayed": after.replayed_steps - before.replayed_steps,
        "eager_for": {str(why): n - before.eager_steps.get(why, 0) for why, n in after.eager_steps.items()},
        "compiled_while_timed": after.num_compiled - before.num_compiled,
        "ratios": {
            f"{below} / {above}": asdict(Spread.of([a / b for a, b in zip(found[above], found[below], strict=True)]))
            for above, below in pairs
        },
    }


def _share(case: dict[str, Any]) -> float:
    """Of what is left of the base's speed if nothing but the memory's bandwidth mattered, how much is reached."""
    parts, step = case["bytes"], case["ms_per_step"]
    kept = parts["weights"] + parts["kv"]
    ceiling = kept / (kept + parts["adapters"])
    return step["base"]["median"] / step["mixed"]["median"] / ceiling


def _check(
    bench: DecodeBench, runtime: Runtime, infos: Sequence[AdapterInfo], prompts: Sequence[tuple[int, ...]]
) -> int:
    """How many checked texts part from their adapter's own, at near ties."""
    own = OwnEngine(runtime, min(_CHECKED_TOKENS, bench.new_tokens))
    owners = [*infos[1:]]
    mixed = own.generate(owners, prompts, logprobs=_NUM_BEST)
    plain = tokens_of(own.generate([infos[0]], prompts[:1])[0])
    alone = [own.generate([owner], [prompt])[0] for owner, prompt in zip(owners[:_NUM_CHECKED], prompts, strict=False)]
    require_different("an adapter", tokens_of(alone[0]), plain)
    limit = NEAR_TIES[bench.dtype]
    return sum(_parts(f"text {i}", tokens_of(one), mixed[i], limit) for i, one in enumerate(alone))


def _parts(what: str, found: Sequence[int], wanted: Sample, limit: float) -> bool:
    """Whether a text parts from the reference at a near tie; raises OutputsDiffer where it is none."""
    for at, (token, step) in enumerate(zip(found, wanted.tokens, strict=True)):
        if token == step.token_id:
            continue
        best = {one.token_id: step.top_logprobs[0].logprob - one.logprob for one in step.top_logprobs}
        if best.get(token, limit + 1) <= limit:
            return True  # what follows has another beginning
        raise OutputsDiffer(f"{what}: token {at} is {token}, in the batch {step.token_id}; nearest were {best}")
    return False


def _decode(
    own: OwnEngine, name: str, infos: Sequence[AdapterInfo], prompts: Sequence[tuple[int, ...]]
) -> dict[str, float]:
    """Milliseconds of a step that continues all texts."""
    running = [own.watch(info, prompt) for info, prompt in zip(infos, prompts, strict=True)]
    for _, future in running:
        sample_of(future)
    begin = max(watched.stamps[0] for watched, _ in running)
    end = min(watched.stamps[-1] for watched, _ in running)
    steps = sum(begin < stamp <= end for stamp in running[0][0].stamps)
    assert steps > 1, f"{name}: the texts were never all under way"
    return {name: 1e3 * (end - begin) / steps}


def _plain(
    runtime: Runtime, model: Any, name: str, prompts: Sequence[tuple[int, ...]], num_tokens: int
) -> dict[str, float]:
    """The same of transformers' forward in a loop with its own cache, in the engine's thread."""

    def loop() -> float:
        ids, cache = torch.tensor([*prompts], device=model.device), DynamicCache(config=model.config)
        kept = cache_name(model)
        started = 0.0
        with torch.inference_mode():
            for step in range(num_tokens):
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{kept: cache})
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                if step == 0:
                    ids.cpu()  # waits for the device
                    started = time.perf_counter()
            ids.cpu()
        return 1e3 * (time.perf_counter() - started) / (num_tokens - 1)

    return {name: runtime.engine.call(loop)}


def _parse(arguments: Sequence[str] | None) -> tuple[DecodeBench, Path]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.decode", description=__doc__)
    parser.add_argument("--shape", choices=[*DECODERS], required=True)
    parser.add_argument("--targets", choices=("all", "attention"), default="all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--contexts", default="128,1024", help="tokens, separated by commas")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=[*NEAR_TIES], default="bfloat16")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--scratch", help="folder for the base and the adapters, such as /dev/shm")
    parser.add_argument("--out", type=Path, help="default: tests/benchmarks/results/decode-SHAPE-TARGETS.json")
    options = parser.parse_args(arguments)
    contexts = tuple(int(number) for number in options.contexts.split(","))
    room = MAX_CONTEXT - options.new_tokens
    if bad := [number for number in contexts if not options.new_tokens <= number <= room]:
        parser.error(f"a context of {bad[0]} is not between --new-tokens and {room}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device that torch can use")
    bench = DecodeBench(
        options.shape, options.targets, options.rank, options.texts, contexts, options.new_tokens, options.rounds,
        options.device, options.dtype, options.threads, options.scratch,
    )  # fmt: skip
    name = f"decode-{bench.shape}-{bench.targets}.json"
    return bench, options.out or Path(__file__).parent / "results" / name


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the file; 1 when a text was wrong."""
    bench, out = _parse(arguments)
    return write_result(partial(run_decode_bench, bench), out)


if __name__ == "__main__":
    sys.exit(main())
