"""transformers and PEFT: the adapters that are measured, the loop that they are measured against, and the oracle."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_runtime.model.checkpoint import read_checkpoint, resolve_source
from server.bench.generate.checks import Step
from server.bench.generate.plan import RANKS

Prompts = Sequence[tuple[int, ...]]  # of one length
_SUM_BYTES = 256 << 20  # of the tensor that is read to measure the memory, far beyond any cache


@dataclass(frozen=True, slots=True)
class Greedy:
    """What the loop generated."""

    tokens: list[list[int]]  # of each prompt
    stamps: list[float]  # perf_counter after each step
    steps: list[list[Step]]  # of each prompt, where they were asked for

    @property
    def ms_per_token(self) -> float:
        """From the first token to the last, without the prompt's time."""
        return 1e3 * (self.stamps[-1] - self.stamps[0]) / (len(self.stamps) - 1)


def make_adapters(base: str, folder: Path, count: int) -> tuple[Any, list[Path]]:
    """A PEFT model of the base in fp32 with random adapters on every linear layer, each also saved under `folder`."""
    torch.manual_seed(0)
    model = read_checkpoint(resolve_source(base)).model.float().eval()
    configs = [
        LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        for rank in (RANKS[i % len(RANKS)] for i in range(count))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, configs[0], adapter_name="a0")
        for i, config in enumerate(configs[1:], 1):
            adapted.add_adapter(f"a{i}", config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted.eval(), [folder / f"a{i}" for i in range(count)]


def generate_greedily(model: Any, prompts: Prompts, num_tokens: int, *, with_steps: bool = False) -> Greedy:
    """transformers' forward in a loop, with its KV cache and without padding."""
    stamps: list[float] = []
    columns: list[torch.Tensor] = []
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    ids, name = torch.tensor(list(prompts)), cache_name(model)
    cache = None
    with torch.inference_mode():
        for _ in range(num_tokens):
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
            logits, cache = out.logits[:, -1], getattr(out, name)
            ids = logits.argmax(-1, keepdim=True)  # [prompts, 1]
            columns.append(ids)
            stamps.append(time.perf_counter())
            if with_steps:
                values, indices = logits.topk(2)
                best.append((values, indices))
    tokens = torch.cat(columns, 1).tolist()
    return Greedy(tokens, stamps, [_steps(row, i, best) for i, row in enumerate(tokens)] if with_steps else [])


def generate_by_adapters(adapted: Any, prompts: Prompts, num_tokens: int) -> list[list[Step]]:
    """PEFT's, the i-th prompt with the i-th adapter, one at a time."""
    steps: list[list[Step]] = []
    for i, prompt in enumerate(prompts):
        adapted.set_adapter(f"a{i}")
        steps += generate_greedily(adapted, [prompt], num_tokens, with_steps=True).steps
    return steps


def weight_bytes(model: Any) -> int:
    """What a step reads of the weights: all but the table of input embeddings, of which it reads a row."""
    everything = sum(p.numel() * p.element_size() for p in model.parameters())  # a tied table comes once
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return everything if table is head else everything - table.numel() * table.element_size()


class Memory:
    """How fast the memory is read."""

    def __init__(self) -> None:
        self._numbers = torch.ones(_SUM_BYTES // 4)

    def bytes_per_second(self) -> float:
        """The best of three sums over a tensor that no cache holds."""
        seconds: list[float] = []
        for _ in range(3):
            started = time.perf_counter()
            self._numbers.sum()
            seconds.append(time.perf_counter() - started)
        return _SUM_BYTES / min(seconds)


def cache_name(model: Any) -> str:
    """What the transformers that is installed calls the KV cache, which it renamed in 5.24."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return "cache" if "cache" in inspect.signature(plain.forward).parameters else "past_key_values"


def _steps(tokens: list[int], row: int, best: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Step]:
    """`argmax` and `topk` may take either of two equal logits, so the second is the one that was not taken."""
    steps: list[Step] = []
    for token, (values, indices) in zip(tokens, best, strict=True):
        first, second = indices[row].tolist()
        gap = float(values[row, 0] - values[row, 1])
        steps.append(Step(token, second if token == first else first, gap))
    return steps
