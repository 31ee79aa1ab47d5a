"""Other encoders: served exactly, heads and all, or refused at load with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.model.load import load_base
from lora_runtime.runtime import Runtime
from tests.oracle import PeftOracle, make_adapter

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
# name → (class of the checkpoint, config fields, LoRA targets, config of the adapter)
SERVED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Roberta": ("RobertaModel", {**SMALL, "pad_token_id": 1}, ["query", "value", "intermediate.dense"]),
    "XLMRoberta": ("XLMRobertaModel", SMALL, ["query", "key"]),
    "Electra": ("ElectraModel", {**SMALL, "embedding_size": 16}, ["query", "value", "embeddings_project"]),
    "DistilBert": (
        "DistilBertModel",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        ["q_lin", "v_lin", "lin1", "lin2"],
    ),
    "ModernBert": ("ModernBertForMaskedLM", {**SMALL, **SPECIAL, "local_attention": 8}, ["Wqkv", "Wo", "head.dense"]),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "MPNet": ("MPNetModel", SMALL, "its own attention"),
    "DebertaV2": ("DebertaV2Model", SMALL, "its own attention"),
    "Albert": ("AlbertModel", {**SMALL, "embedding_size": 16}, "head gives other logits"),
}
TEXTS = [
    "Short.",
    "a longer text, beyond the eight tokens of a local window, so that the window matters",
    "the end [PAD]",
]


def save_base(name: str, model_class: str, fields: dict[str, Any], folder: Path, encoder_path: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **fields)
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SERVED)
def test_a_served_architecture_equals_peft(name: str, tmp_path: Path, encoder_path: Path) -> None:
    model_class, fields, targets = SERVED[name]
    base = save_base(name, model_class, fields, tmp_path / "base", encoder_path)
    heads = {"one": 3, "two": 5}
    for seed, (adapter, labels) in enumerate(heads.items()):
        make_adapter(base, tmp_path / adapter, rank=3 + seed, targets=targets, num_labels=labels, seed=seed)
    with Runtime(base) as runtime:
        for adapter, labels in heads.items():
            runtime.load(tmp_path / adapter)
            oracle = PeftOracle(base, tmp_path / adapter, labels)
            for text, found in zip(TEXTS, runtime.classify(adapter, TEXTS), strict=True):
                want = oracle.logits(text).softmax(-1)
                assert torch.allclose(torch.tensor(list(found.scores.values())), want, atol=2e-5), text


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_would_be_wrong_is_refused(name: str, tmp_path: Path, encoder_path: Path) -> None:
    model_class, fields, words = REFUSED[name]
    base = save_base(name, model_class, fields, tmp_path / "base", encoder_path)
    with pytest.raises(BaseModelUnsupported, match=words):
        load_base(base)


def test_a_folder_that_is_an_adapter_is_no_base(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match="the folder holds an adapter"):
        load_base(make_adapter(tiny_bert, tmp_path / "news"))


def test_an_empty_folder_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match="cannot be loaded"):
        load_base(tmp_path)


def test_a_checkpoint_without_some_weights_is_no_base(tmp_path: Path, tiny_bert: Path) -> None:
    import shutil

    import safetensors.torch

    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelUnsupported, match="lacks"):
        load_base(base)
