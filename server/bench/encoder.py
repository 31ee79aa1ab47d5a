"""Many adapters on one encoder: own mixed batches against own base, transformers and PEFT, the same work each.

Every contender classifies the same texts with sequence-classification heads of four labels. `own_mixed` and
`peft_mixed` give each text its own adapter and head; the two bases use one head for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from lora_runtime.arena import BASE_SLOT
from lora_runtime.batch import Row
from lora_runtime.engine import Engine
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import AdapterId, Classification, Request, Task, TokenSequence
from server.bench.measure import OutputsDiffer, Spread, describe_machine, interleave, largest_difference, ratio
from server.bench.packed import run_packed

NUM_LABELS = 4
TOLERANCE = 1e-4  # absolute, on logits in fp32
TARGETS = {
    "qv": ["query", "value"],
    "all": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}


@dataclass(frozen=True, slots=True)
class EncoderBench:
    """What is measured."""

    base: str
    texts: tuple[str, ...]
    num_adapters: int = 64
    rank: int = 8
    targets: str = "qv"
    rounds: int = 7
    token_budget: int = 2048  # of our batches
    padded_batch: int = 32  # texts in a padded batch of the others
    threads: int = 2


Adapters = list[AdapterId]


def run_encoder_bench(bench: EncoderBench, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure and return the result as plain data; raises OutputsDiffer before any timing when an answer is wrong.

    Every contender computes in the engine's thread: a second computing thread would slow them all (see Engine.call).
    """
    settings = RuntimeSettings(token_budget=bench.token_budget, num_threads=bench.threads)
    with tempfile.TemporaryDirectory() as scratch, _quiet(), Runtime(bench.base, settings) as runtime:
        call = runtime.engine.call
        progress(f"making {bench.num_adapters} adapters of rank {bench.rank} on {bench.targets}")
        peft_model = call(lambda: _make_adapters(bench, Path(scratch)))
        loaded = [runtime.load(Path(scratch) / f"a{i}", name=f"a{i}") for i in range(bench.num_adapters)]
        adapters = [info.id for info in loaded]
        sequences = runtime.encoder.encode([(text, None) for text in bench.texts], max_length=None, truncate=True)
        owner = [i % bench.num_adapters for i in range(len(sequences))]
        contenders = _contenders(bench, runtime, adapters, peft_model, sequences, owner)
        progress("checking every contender's outputs")
        reference = call(lambda: _reference(bench.base, Path(scratch), sequences, owner))
        errors = _check(contenders, reference)
        turns: dict[str, Callable[[], object]] = dict(contenders)
        seconds = interleave(turns, bench.rounds, lambda turn: progress(f"round {turn} of {bench.rounds}"))
    loads = Spread.of([info.load_seconds or 0.0 for info in loaded])
    return _result(bench, sequences, errors, seconds) | {"load_seconds": asdict(loads)}


def _result(
    bench: EncoderBench, sequences: tuple[TokenSequence, ...], errors: dict[str, float], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    lengths = sorted(s.num_tokens for s in sequences)
    settings = {key: value for key, value in asdict(bench).items() if key not in ("texts", "base")}
    ratios = {
        "own_mixed / own_base": ratio(seconds, "own_mixed", "own_base"),
        "own_mixed / peft_mixed": ratio(seconds, "own_mixed", "peft_mixed"),
        "own_base / transformers_base": ratio(seconds, "own_base", "transformers_base"),
        "own_engine / own_mixed": ratio(seconds, "own_engine", "own_mixed"),
    }
    throughput = {name: Spread.of([len(sequences) / s for s in found]) for name, found in seconds.items()}
    return {
        "benchmark": "encoder",
        "base": Path(bench.base).parent.name if Path(bench.base).is_dir() else bench.base,
        "settings": settings,
        "texts": {
            "count": len(lengths),
            "tokens": sum(lengths),
            "median_tokens": lengths[len(lengths) // 2],
            "longest": lengths[-1],
        },
        "machine": describe_machine(),
        "largest_error": errors,
        "tolerance": TOLERANCE,
        "texts_per_second": {name: asdict(spread) for name, spread in throughput.items()},
        "ratios": {name: asdict(spread) for name, spread in ratios.items()},
        "seconds": seconds,
    }


def _make_adapters(bench: EncoderBench, folder: Path) -> PeftModel:
    """One PEFT model with all adapters, random and large enough to matter; each also saved under `folder`."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bench.base, num_labels=NUM_LABELS)
    config = LoraConfig(
        task_type="SEQ_CLS", r=bench.rank, lora_alpha=2 * bench.rank, target_modules=TARGETS[bench.targets]
    )
    adapted = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, bench.num_adapters):
        adapted.add_adapter(f"a{i}", config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


def _contenders(
    bench: EncoderBench,
    runtime: Runtime,
    adapters: Adapters,
    peft_model: PeftModel,
    sequences: tuple[TokenSequence, ...],
    owner: list[int],
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Each returns the logits of every text, in the order of `sequences`."""
    base = AutoModelForSequenceClassification.from_pretrained(bench.base, num_labels=NUM_LABELS).eval()
    residents = runtime.engine.hold(adapters)
    _copy_head(base, residents[adapters[0]].params)
    no_lora = replace(residents[adapters[0]], slot=BASE_SLOT)
    one_head = [Row(s, no_lora, Task.CLASSIFY) for s in sequences]
    own_head = [Row(s, residents[adapters[i]], Task.CLASSIFY) for s, i in zip(sequences, owner, strict=True)]
    padded = _padded_batches(sequences, bench.padded_batch)
    names = [f"a{i}" for i in owner]
    call = runtime.engine.call
    return {
        "own_base": lambda: call(lambda: run_packed(runtime, one_head, bench.token_budget)),
        "own_mixed": lambda: call(lambda: run_packed(runtime, own_head, bench.token_budget)),
        "own_engine": lambda: _run_engine(runtime.engine, adapters, sequences, owner),
        "transformers_base": lambda: call(lambda: _run_padded(base, padded, len(sequences), None)),
        "peft_mixed": lambda: call(lambda: _run_padded(peft_model, padded, len(sequences), names)),
    }


def _copy_head(model: Any, params: Any) -> None:
    with torch.no_grad():
        for name, value in params.items():
            model.get_parameter(name).copy_(value)


def _run_engine(
    engine: Engine, adapters: Adapters, sequences: tuple[TokenSequence, ...], owner: list[int]
) -> list[torch.Tensor]:
    """A request per text through the engine's queue."""
    futures = [
        engine.submit(Request(f"{i}", adapters[owner[i]], Task.CLASSIFY, (sequence,)))
        for i, sequence in enumerate(sequences)
    ]
    outputs = [future.result().outputs[0] for future in futures]
    return [torch.tensor(output.logits) for output in outputs if isinstance(output, Classification)]


@dataclass(frozen=True, slots=True)
class _Padded:
    index: list[int]
    input_ids: torch.Tensor  # [n, longest]
    attention_mask: torch.Tensor


def _padded_batches(sequences: tuple[TokenSequence, ...], size: int) -> list[_Padded]:
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].num_tokens)
    batches: list[_Padded] = []
    for start in range(0, len(order), size):
        index = order[start : start + size]
        width = sequences[index[-1]].num_tokens
        ids = torch.zeros(len(index), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(index):
            ids[row, : sequences[i].num_tokens] = torch.tensor(sequences[i].input_ids)
            mask[row, : sequences[i].num_tokens] = 1
        batches.append(_Padded(index, ids, mask))
    return batches


def _run_padded(model: Any, batches: list[_Padded], count: int, names: list[str] | None) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = [torch.empty(0)] * count
    with torch.inference_mode():
        for batch in batches:
            extra = {} if names is None else {"adapter_names": [names[i] for i in batch.index]}
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra).logits
            for row, i in enumerate(batch.index):
                outputs[i] = logits[row]
    return outputs


def _check(contenders: dict[str, Callable[[], list[torch.Tensor]]], reference: list[torch.Tensor]) -> dict[str, float]:
    """Largest error of each contender: the mixed ones against `reference`, our base against transformers'."""
    plain = contenders["transformers_base"]()
    errors = {
        name: largest_difference(run(), plain if name == "own_base" else reference)
        for name, run in contenders.items()
        if name != "transformers_base"
    }
    if wrong := {name: error for name, error in errors.items() if not error <= TOLERANCE}:
        raise OutputsDiffer(f"outputs differ from the reference (limit {TOLERANCE}): {wrong}; nothing was timed")
    return errors


def _reference(base: str, folder: Path, sequences: tuple[TokenSequence, ...], owner: list[int]) -> list[torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=NUM_LABELS)
    adapted = PeftModel.from_pretrained(model, str(folder / "a0"), adapter_name="a0")
    for i in range(1, max(owner) + 1):
        adapted.load_adapter(str(folder / f"a{i}"), f"a{i}")
    outputs: list[torch.Tensor] = []
    with torch.inference_mode():
        for sequence, i in zip(sequences, owner, strict=True):
            adapted.set_adapter(f"a{i}")
            outputs.append(adapted.eval()(input_ids=torch.tensor([sequence.input_ids])).logits[0])
    return outputs


@contextmanager
def _quiet() -> Generator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
