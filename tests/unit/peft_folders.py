"""Adapter folders saved by PEFT itself, and ways to spoil them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

from tests.unit.base_specs import VOCABULARY, task_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NO_LIMIT = 1 << 40
ALL = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
ALL |= {"tied-llama": ALL["llama"], "gemma": ALL["llama"]}


def save(
    family: str,
    task_type: str,
    folder: Path,
    *,
    vocab_size: int = VOCABULARY,
    save_embedding: Any = "auto",
    **config: Any,
) -> Path:
    """Save an adapter of `family` whose every value was drawn at random, as after training."""
    torch.manual_seed(1)
    model = task_model(family, task_type, vocab_size)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL[family]} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(task_type=task_type, **options))
        _train(adapted, options.get("bias", "none"))
        adapted.save_pretrained(str(folder), save_embedding_layers=save_embedding)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def _train(model: Any, bias: str) -> None:
    """Move what training would move."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias") and "original_module" not in name:
                adapted = name.endswith("base_layer.bias")
                if bias == "all" or (bias == "lora_only" and adapted):
                    parameter.add_(0.2 * torch.randn_like(parameter))


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def rename(folder: Path, old: str, new: str) -> None:
    """Replace `old` by `new` in every key that has it."""
    change_tensors(folder, lambda t: t.update({key.replace(old, new): t.pop(key) for key in list(t) if old in key}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def drop(folder: Path, *endings: str) -> None:
    """Remove the tensors whose keys end so."""
    change_tensors(folder, lambda t: [t.pop(key) for key in list(t) if key.endswith(endings)])
