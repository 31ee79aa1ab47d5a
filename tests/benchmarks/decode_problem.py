"""Decoders of random weights with random PEFT adapters, in folders, as the runtime loads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from tests.conformance.families import byte_pairs

MAX_CONTEXT = 2048
_SPREAD = 0.02  # of weights, as most checkpoints are initialised
_DELTA = 0.5  # of an adapter's delta beside what the base's projection gives, about


@dataclass(frozen=True, slots=True)
class Decoder:
    """An architecture with random weights."""

    make: Callable[[], PretrainedConfig]
    targets: dict[str, tuple[str, ...]]  # suffixes of the modules that adapters change, by what the option calls them


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> Callable[[], LlamaConfig]:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    more: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}
    return lambda: LlamaConfig(max_position_embeddings=MAX_CONTEXT, initializer_range=_SPREAD, **sizes, **more)


def _gpt2(width: int, layers: int, heads: int) -> Callable[[], GPT2Config]:
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": heads}
    return lambda: GPT2Config(n_positions=MAX_CONTEXT, initializer_range=_SPREAD, **sizes)


_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = {"all": _LLAMA_LINEARS, "attention": ("q_proj", "v_proj")}
_GPT2 = {"all": ("c_attn", "c_proj", "c_fc"), "attention": ("c_attn",)}

DECODERS = {
    "tiny": Decoder(_llama(64, 128, 2, 4, 2, 330), _LLAMA),
    "smollm2-135m": Decoder(_llama(576, 1536, 30, 9, 3, 49_152), _LLAMA),
    "gpt2-medium": Decoder(_gpt2(1024, 24, 16), _GPT2),
    "llama-1b": Decoder(_llama(2048, 8192, 16, 32, 8, 128_256), _LLAMA),
    "llama-7b": Decoder(_llama(4096, 11_008, 32, 32, 32, 32_000), _LLAMA),
}


def save_base(decoder: Decoder, folder: Path, device: torch.device, dtype: torch.dtype) -> PretrainedConfig:
    """Weights drawn on the device, and a tokenizer that the prompts do not need."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(decoder.make(), dtype=dtype)
    model.save_pretrained(str(folder))
    byte_pairs().save_pretrained(str(folder))
    return model.config


def save_adapter(base: Path, folder: Path, targets: Sequence[str], rank: int, device: torch.device, seed: int) -> int:
    """A PEFT folder with random matrices at every module with one of these names; returns its parameters' bytes."""
    config = AutoConfig.from_pretrained(str(base))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = skeleton.config.dtype
    tensors: dict[str, torch.Tensor] = {}
    for name, d_in, d_out in _projections(skeleton, targets):
        scales = {"A": (rank, d_in, d_in**-0.5), "B": (d_out, rank, _DELTA * _SPREAD * d_in**0.5 * rank**-0.5)}
        for side, (rows, columns, scale) in scales.items():
            drawn = torch.randn(rows, columns, generator=generator, device=device) * scale
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = drawn.to(dtype).cpu()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": [*targets],
        "fan_in_fan_out": config.model_type == "gpt2", "bias": "none", "base_model_name_or_path": str(base),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(written), encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


def _projections(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets and isinstance(module, (nn.Linear, Conv1D)):
            rows, columns = module.weight.shape
            yield name, *((rows, columns) if isinstance(module, Conv1D) else (columns, rows))


def random_prompts(count: int, num_tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(num_tokens)
    return [tuple(torch.randint(1, vocabulary, (num_tokens,), generator=generator).tolist()) for _ in range(count)]
