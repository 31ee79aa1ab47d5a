"""Tiny random task models, each with the BaseSpec of a base that would serve its adapters: no base is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from lora_runtime.adapters.base_spec import BaseSpec, HeadSpec, Leaf, LeafKind
from lora_runtime.adapters.metadata import BaseFingerprint
from lora_runtime.types import Site, SiteGroup, Task

VOCABULARY, WIDTH, LABELS = 30, 12, 3
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def _bert() -> PretrainedConfig:
    return BertConfig(**_SIZES, intermediate_size=20)


def _gpt2() -> PretrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, initializer_range=0.3
    )


def _llama(*, tied: bool) -> Callable[[], PretrainedConfig]:
    return lambda: LlamaConfig(**_SIZES, intermediate_size=20, num_key_value_heads=1, tie_word_embeddings=tied)


def _gemma() -> PretrainedConfig:
    return Gemma3TextConfig(
        **_SIZES, intermediate_size=20, num_key_value_heads=1, head_dim=8, sliding_window=8, attention_bias=True
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama(tied=False),
    "tied-llama": _llama(tied=True),
    "gemma": _gemma,
}
CLASSES: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
    "CAUSAL_LM": AutoModelForCausalLM,
}


def task_model(family: str, task_type: str, vocab_size: int = VOCABULARY) -> Any:
    """A random task model; the backbone's weights are the same for every task of a family."""
    config = CONFIGS[family]()
    config.num_labels = LABELS if task_type in ("SEQ_CLS", "TOKEN_CLS") else 2
    model = CLASSES[task_type].from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(_backbone(model).named_parameters()):
            parameter.normal_(0, 0.3, generator=generator)
        for name, parameter in sorted(model.named_parameters()):
            if name == "lm_head.weight":
                parameter.normal_(0, 0.3, generator=generator)
    if vocab_size != VOCABULARY:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model


def _backbone(model: Any) -> nn.Module:
    return getattr(model, model.base_model_prefix, model)


@dataclass
class _Found:
    sites: list[Site]
    groups: list[SiteGroup]
    leaves: dict[str, Leaf]
    parameters: dict[str, np.ndarray[Any, np.dtype[np.float32]]]

    def add(self, path: str, module: nn.Module, *, per_sequence: bool) -> None:
        linear = isinstance(module, (nn.Linear, Conv1D))
        kind = LeafKind.LINEAR if linear else LeafKind.OTHER
        kind = LeafKind.EMBEDDING if isinstance(module, nn.Embedding) else kind
        shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
        transposed = isinstance(module, Conv1D)
        scale = float(getattr(module, "embed_scale", 1.0))
        self.leaves[path] = Leaf(path, kind, shapes, transposed, scale, per_sequence)
        self.parameters |= {f"{path}.{n}": v.detach().numpy() for n, v in module.named_parameters()}
        if linear:
            d_out, d_in = shapes["weight"][::-1] if transposed else shapes["weight"]
            group = len(self.groups)
            self.sites.append(Site(len(self.sites), path, d_in, d_out, group, per_sequence))
            self.groups.append(SiteGroup(group, d_in, (self.sites[-1],)))


def spec_of(family: str, **changes: Any) -> BaseSpec:
    """The base that serves adapters of a family to every task it has."""
    is_decoder = family != "bert"
    model = task_model(family, "CAUSAL_LM" if is_decoder else "SEQ_CLS")
    backbone = _backbone(model)
    found = _Found([], [], {}, {})
    for path, module in backbone.named_modules():
        if not any(module.children()) and any(True for _ in module.parameters()):
            found.add(path, module, per_sequence=path.startswith("pooler"))
    if is_decoder:
        found.add("lm_head", model.lm_head, per_sequence=True)
    fields: dict[str, Any] = {
        "name": family,
        "prefixes": (model.base_model_prefix,),
        "sites": tuple(found.sites),
        "groups": tuple(found.groups),
        "heads": _heads(is_decoder),
        "fingerprint": BaseFingerprint(
            model_type=family, hidden_size=WIDTH, num_layers=2, vocab_size=VOCABULARY, modules_sha256="0",
            weights_sha256="0",
        ),
        "max_length": 32,
        "modules": frozenset(path for path, _ in backbone.named_modules()),
        "leaves": found.leaves,
        "parameters": found.parameters,
        "is_decoder": is_decoder,
        "word_embedding": next(p for p in found.leaves if p.endswith(("word_embeddings", "wte", "embed_tokens"))),
        "tied_output": family in ("tied-llama", "gpt2", "gemma"),
        "pad_token_id": 0,
    }  # fmt: skip
    return BaseSpec(**(fields | changes))


def _heads(is_decoder: bool) -> dict[Task, HeadSpec]:
    name = "score" if is_decoder else "classifier"
    row: dict[str, tuple[int | None, ...]] = {f"{name}.weight": (None, WIDTH)}
    biased = row | {f"{name}.bias": (None,)}
    pooler = {} if is_decoder else {"pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,)}
    spans: dict[str, tuple[int | None, ...]] = {"qa_outputs.weight": (2, WIDTH), "qa_outputs.bias": (2,)}
    empty: frozenset[str] = frozenset()
    heads = [
        HeadSpec(Task.CLASSIFY, (row if is_decoder else biased) | pooler, frozenset(pooler), empty, f"{name}.weight"),
        HeadSpec(Task.CLASSIFY_TOKENS, biased, empty, empty, f"{name}.weight"),
        HeadSpec(Task.ANSWER, spans, empty, empty, "qa_outputs.weight", num_outputs=2),
        HeadSpec(Task.EMBED, {}, empty, empty, ""),
    ]
    if is_decoder:
        shapes: dict[str, tuple[int | None, ...]] = {"lm_head.weight": (None, WIDTH)}
        heads.append(HeadSpec(Task.GENERATE, shapes, frozenset(shapes), empty, ""))
    return {head.task: head for head in heads}
