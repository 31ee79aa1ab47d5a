"""An int8 base beside the fp32 base: `python -m tests.benchmarks.quantized` writes `results/quantized-cpu.json`.

Accuracy on the packaged encoder, speed with the contenders taking turns, memory in a process of its own for each.
Nothing is written when the fp32 bases differ from each other or the int8 base from fp32 by more than rounding to int8.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_runtime.batch import Row
from lora_runtime.model.quantize import QuantizedLinear
from lora_runtime.model.wrapped import LoraLinear
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import TokenSequence
from server.bench.measure import OutputsDiffer, Spread, describe_machine, interleave, ratio
from server.bench.texts import default_base, sample_texts
from tests.benchmarks.result_file import write_result
from tests.oracle import make_adapter

OUT = Path(__file__).parent / "results" / "quantized-cpu.json"
CONTENDERS: dict[str, dict[str, Any]] = {
    "fp32": {"prepack": False},
    "fp32_prepacked": {},
    "int8": {"quantize": "int8"},
}
NUM_TOKENS = (7, 84, 256, 2048)
NUM_LABELS = 5
_ROW_TOKENS = 64  # of the longest sequence of a batch
_LEAST_COSINE = 0.95  # of a sentence's embedding in int8 and in fp32
_MEMORY = """
import sys
from pathlib import Path
from lora_runtime.runtime import Runtime, RuntimeSettings
with Runtime(sys.argv[1], RuntimeSettings(**eval(sys.argv[2]))) as runtime:
    runtime.embed("base", ["a sentence"])
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["RssAnon"].split()[0]) / 1024)
"""


def measure(rounds: int, threads: int, num_texts: int) -> dict[str, Any]:
    """Everything that the result file has. Raises OutputsDiffer."""
    base = default_base()
    texts = sample_texts(num_texts)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        adapter = make_adapter(Path(base), Path(folder) / "intents", rank=8, num_labels=NUM_LABELS)
        runtimes = {
            name: stack.enter_context(Runtime(base, RuntimeSettings(num_threads=threads, **settings)))
            for name, settings in CONTENDERS.items()
        }
        for runtime in runtimes.values():
            runtime.load(adapter)
        accuracy = _accuracy(runtimes, texts)
        speed = {str(n): _speed(runtimes, n, rounds) for n in NUM_TOKENS}
        projections = _projection_bytes(runtimes["int8"])
    return {
        "benchmark": "quantized",
        "machine": describe_machine(),
        "settings": {"rounds": rounds, "threads": threads, "texts": num_texts, "labels": NUM_LABELS},
        "accuracy": accuracy,
        "speed": speed,
        "projection_bytes": projections,
        "process_mib": {name: _memory(base, settings) for name, settings in CONTENDERS.items()},
    }


def _accuracy(runtimes: dict[str, Runtime], texts: tuple[str, ...]) -> dict[str, float]:
    vectors = {name: torch.tensor(runtime.embed("base", texts, normalize=True)) for name, runtime in runtimes.items()}
    if (packed := float((vectors["fp32"] - vectors["fp32_prepacked"]).abs().max())) > 1e-5:
        raise OutputsDiffer(f"prepacked and plain embeddings differ by {packed:.1e}")
    difference = (vectors["int8"] - vectors["fp32"]).abs()
    cosine = (vectors["int8"] * vectors["fp32"]).sum(-1)
    if float(cosine.min()) < _LEAST_COSINE:
        raise OutputsDiffer(f"the cosine of int8 and fp32 embeddings falls to {float(cosine.min()):.4f}")
    answers = {name: runtimes[name].classify("intents", texts) for name in ("fp32", "int8")}
    scores = {name: torch.tensor([list(a.scores.values()) for a in found]) for name, found in answers.items()}
    agree = [a.label == b.label for a, b in zip(answers["fp32"], answers["int8"], strict=True)]
    alone = torch.tensor([runtimes["int8"].embed("base", [text], normalize=True)[0] for text in texts[:32]])
    return {
        "embedding_max": float(difference.max()),
        "embedding_mean": float(difference.mean()),
        "cosine_least": float(cosine.min()),
        "cosine_mean": float(cosine.mean()),
        "score_max": float((scores["int8"] - scores["fp32"]).abs().max()),
        "same_label": sum(agree) / len(agree),
        "alone_max": float((alone - vectors["int8"][:32]).abs().max()),
    }


def _speed(runtimes: dict[str, Runtime], num_tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one forward pass over rows of the base, and the ratios of throughput."""
    lengths = [_ROW_TOKENS] * (num_tokens // _ROW_TOKENS)
    lengths += [rest] if (rest := num_tokens % _ROW_TOKENS) else []
    rows = [Row(TokenSequence(tuple(range(2000, 2000 + n)), None)) for n in lengths]
    repeats = max(1, 2048 // num_tokens // 4)

    def passes(runtime: Runtime) -> Callable[[], object]:
        def run() -> None:
            for _ in range(repeats):
                runtime.engine.call(lambda: runtime.runner.hidden_states(rows))

        return run

    seconds = interleave({name: passes(runtime) for name, runtime in runtimes.items()}, rounds, lambda _: None)
    milliseconds = {
        name: asdict(Spread.of([1e3 * turn / repeats for turn in turns])) for name, turns in seconds.items()
    }
    ratios = {slow: asdict(ratio(seconds, "int8", slow)) for slow in ("fp32", "fp32_prepacked")}
    return {"milliseconds": milliseconds, "int8_speedup": ratios}


def _projection_bytes(runtime: Runtime) -> dict[str, int]:
    modules = runtime.runner._base.backbone.inputs.module.modules()  # pyright: ignore[reportPrivateUsage]
    linears = [module for module in modules if isinstance(module, LoraLinear)]
    products = [linear.base.product for linear in linears if isinstance(linear.base, QuantizedLinear)]
    return {
        "fp32": sum(4 * linear.site.d_in * linear.site.d_out for linear in linears),
        "int8": sum(value.nbytes for product in products for value in product.state_dict().values()),
    }


def _memory(base: str, settings: dict[str, Any]) -> float:
    """MiB of anonymous memory of a process that has loaded the base and embedded a sentence."""
    command = [sys.executable, "-c", _MEMORY, base, repr(settings)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


def main() -> int:
    """Measure and write the file; 1 when an answer was too far off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    return write_result(lambda _: measure(arguments.rounds, arguments.threads, arguments.texts), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
