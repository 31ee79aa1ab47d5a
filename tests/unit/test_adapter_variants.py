"""Each variant of PEFT's LoRA is read into numbers that make every module answer as under PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from lora_runtime.adapters.base_spec import BaseSpec, LeafKind
from lora_runtime.adapters.checkpoint import Checkpoint, read_checkpoint
from lora_runtime.adapters.extras import ModuleExtras
from tests.unit.base_specs import VOCABULARY, spec_of, task_model
from tests.unit.peft_folders import NO_LIMIT, save

TOLERANCE = 1e-5  # relative Frobenius, fp32


def peft_model(family: str, task_type: str, folder: Path, vocab_size: int = VOCABULARY) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(task_model(family, task_type, vocab_size), str(folder)).eval().base_model.model


def ours(checkpoint: Checkpoint, base: BaseSpec, path: str, x: Any) -> Any:
    """What a module answers with the adapter: the semantics of SiteWeights and ModuleExtras, in float64."""
    leaf, extra = base.leaves[path], checkpoint.extras.get(path, ModuleExtras())
    params = {name: base.parameters[f"{path}.{name}"] for name in leaf.shapes} | extra.params
    params |= {
        name: checkpoint.params[f"{path}.{name}"] for name in leaf.shapes if f"{path}.{name}" in checkpoint.params
    }
    params = {name: value.astype(np.float64) for name, value in params.items()}
    if leaf.kind is LeafKind.EMBEDDING:
        return _embedded(params["weight"] * leaf.embed_scale, extra, x)
    weight = params["weight"].T if leaf.transposed else params["weight"]
    if extra.row_ids is not None:
        weight = weight.copy()
        weight[extra.row_ids] = extra.rows
    y = x @ weight.T + params.get("bias", 0.0)
    for site in checkpoint.sites:
        if site.site.name == path:
            y += site.scaling * (x @ site.a.T.astype(np.float64)) @ site.b.T
    y = y if extra.gain is None else extra.gain * y
    return y if extra.shift is None else y + extra.shift


def _embedded(table: Any, extra: ModuleExtras, ids: Any) -> Any:
    y = table[np.minimum(ids, len(table) - 1)]
    if extra.row_ids is not None:
        assert extra.rows is not None
        for i, row in zip(extra.row_ids, extra.rows, strict=True):
            y[ids == i] = row
    if extra.embed_a is not None:
        y = y + extra.embed_a[ids].astype(np.float64) @ extra.embed_b
    return y if extra.gain is None else extra.gain * y


def assert_modules_answer_as_peft(
    family: str, task_type: str, folder: Path, checkpoint: Checkpoint, *, vocab_size: int = VOCABULARY
) -> None:
    base, model = spec_of(family), peft_model(family, task_type, folder, vocab_size)
    prefix = next(iter(base.prefixes)) + "."
    modules = dict(model.named_modules())
    untouched = 0
    for path, leaf in base.leaves.items():
        module = modules.get(prefix + path, modules.get(path))
        if module is None:
            continue  # this task class has no such module
        untouched += path not in checkpoint.extras
        if leaf.kind is LeafKind.OTHER:
            extra = checkpoint.extras.get(path, ModuleExtras())
            for name in leaf.shapes:
                mine = extra.params.get(name, base.parameters[f"{path}.{name}"])
                assert np.array_equal(mine, getattr(module, name).detach().numpy()), f"{path}.{name}"
            continue
        rng = np.random.default_rng(3)
        if leaf.kind is LeafKind.EMBEDDING:
            rows = vocab_size if path == base.word_embedding else leaf.shapes["weight"][0]
            x: Any = np.arange(rows)
            given = torch.from_numpy(x)
        else:
            x = rng.standard_normal((5, leaf.shapes["weight"][0 if leaf.transposed else 1]))
            given = torch.from_numpy(x.astype(np.float32))
        with torch.inference_mode():
            theirs = module(given).numpy().astype(np.float64)
        mine = ours(checkpoint, base, path, x)
        assert mine.shape == theirs.shape, path
        difference = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)
        assert difference < TOLERANCE, f"{path}: {difference}"


@dataclass(frozen=True)
class Case:
    family: str
    task_type: str
    config: Mapping[str, Any]
    vocab_size: int = VOCABULARY
    save_embedding: Any = "auto"


def _bd(family: str) -> BdLoraConfig:
    a, b = (["o_proj", "down_proj"], ["q_proj", "gate_proj"]) if family == "llama" else (["output.dense"], ["query"])
    return BdLoraConfig(target_modules_bd_a=a, target_modules_bd_b=b, nblocks=2, match_strict=False)


CASES: dict[str, Case] = {
    "plain": Case("bert", "SEQ_CLS", {}),
    "rslora": Case("bert", "SEQ_CLS", {"use_rslora": True}),
    "patterns": Case("bert", "SEQ_CLS", {"rank_pattern": {"query": 2}, "alpha_pattern": {r"layer\.1\..*": 3}}),
    "lora bias": Case("bert", "SEQ_CLS", {"lora_bias": True}),
    "bias lora_only": Case("bert", "SEQ_CLS", {"bias": "lora_only", "target_modules": ["query", "output.dense"]}),
    "bias all": Case("bert", "SEQ_CLS", {"bias": "all", "target_modules": ["query"]}),
    "bias all of token classes": Case("bert", "TOKEN_CLS", {"bias": "all", "target_modules": ["query"]}),
    "lora bias and bias all": Case(
        "bert", "QUESTION_ANS", {"bias": "all", "lora_bias": True, "target_modules": ["key"]}
    ),
    "DoRA": Case("bert", "SEQ_CLS", {"use_dora": True, "use_rslora": True}),
    "DoRA and biases": Case("bert", "SEQ_CLS", {"use_dora": True, "bias": "all"}),
    "DoRA on Conv1D": Case("gpt2", "CAUSAL_LM", {"use_dora": True, "bias": "lora_only"}),
    "DoRA and PiSSA": Case("llama", "CAUSAL_LM", {"use_dora": True, "init_lora_weights": "pissa"}),
    "DoRA on tables": Case(
        "bert", "FEATURE_EXTRACTION",
        {"use_dora": True, "target_modules": ["query", "word_embeddings", "position_embeddings"]},
    ),
    "embedding": Case("bert", "FEATURE_EXTRACTION", {"target_modules": ["query", "word_embeddings"]}),
    "scaled embedding": Case("gemma", "CAUSAL_LM", {"target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA on a scaled embedding": Case(
        "gemma", "CAUSAL_LM", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}
    ),
    "lm_head": Case("llama", "CAUSAL_LM", {"target_modules": ["q_proj", "lm_head"]}),
    "DoRA on lm_head": Case("llama", "CAUSAL_LM", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "tied lm_head": Case("tied-llama", "CAUSAL_LM", {"target_modules": ["q_proj", "lm_head"]}),
    "weight tying kept by LoRA": Case(
        "tied-llama", "CAUSAL_LM", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    ),
    "weight tying kept by saving": Case(
        "tied-llama", "CAUSAL_LM",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved embedding": Case("tied-llama", "CAUSAL_LM", {"modules_to_save": ["embed_tokens"]}),
    "saved lm_head": Case("tied-llama", "CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
    "saved norms": Case("llama", "CAUSAL_LM", {"modules_to_save": ["norm"]}),
    "saved linear layers": Case("llama", "SEQ_CLS", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "saved pooler": Case("bert", "SEQ_CLS", {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}),
    "saved Conv1D": Case("gpt2", "SEQ_CLS", {"target_modules": ["c_attn"], "modules_to_save": ["mlp", "score"]}),
    "resized": Case("llama", "CAUSAL_LM", {}, vocab_size=VOCABULARY + 4, save_embedding=True),
    "resized and tied": Case("tied-llama", "CAUSAL_LM", {}, vocab_size=VOCABULARY + 4, save_embedding=True),
    "resized and adapted": Case(
        "bert", "FEATURE_EXTRACTION", {"target_modules": ["query", "word_embeddings"], "use_dora": True},
        vocab_size=VOCABULARY + 4, save_embedding=True,
    ),
    "tokens": Case("llama", "CAUSAL_LM", {"trainable_token_indices": [9, 2, 5]}),
    "tokens of a tied base": Case("tied-llama", "CAUSAL_LM", {"trainable_token_indices": [9, 2, 5]}),
    "tokens of a scaled embedding": Case("gemma", "CAUSAL_LM", {"trainable_token_indices": [9, 2, 5]}),
    "tokens by name": Case("llama", "CAUSAL_LM", {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [4]}}),
    "tokens by name, tied": Case("tied-llama", "CAUSAL_LM", {"trainable_token_indices": {"embed_tokens": [3, 1]}}),
    "tokens of a tied base apart": Case(
        "tied-llama", "CAUSAL_LM", {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [4]}}
    ),
    "tokens of a tied base, both named": Case(
        "tied-llama", "CAUSAL_LM", {"trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]}}
    ),
    "new tokens": Case(
        "tied-llama", "CAUSAL_LM", {"trainable_token_indices": [30, 31]}, vocab_size=VOCABULARY + 2, save_embedding=True
    ),
    "tokens of a classifier": Case("bert", "SEQ_CLS", {"trainable_token_indices": [9, 2], "bias": "all"}),
    "PiSSA": Case("bert", "SEQ_CLS", {"init_lora_weights": "pissa"}),
    "PiSSA by rsLoRA and pattern": Case(
        "bert", "SEQ_CLS", {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"value": 7}}
    ),
    "PiSSA on Conv1D": Case("gpt2", "CAUSAL_LM", {"init_lora_weights": "pissa"}),
    "PiSSA with an embedding": Case(
        "llama", "CAUSAL_LM", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    ),
    "PiSSA on lm_head without its copy": Case(
        "llama", "CAUSAL_LM", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "lm_head"]},
        save_embedding=False,
    ),
    "OLoRA": Case("llama", "CAUSAL_LM", {"init_lora_weights": "olora"}),
    "KaSA": Case("llama", "CAUSAL_LM", {"kasa_config": KasaConfig()}),
    "KaSA with rsLoRA": Case("bert", "SEQ_CLS", {"kasa_config": KasaConfig(), "use_rslora": True}),
    "KaSA on lm_head": Case("llama", "CAUSAL_LM", {"kasa_config": KasaConfig(), "target_modules": ["lm_head"]}),
    "BD-LoRA": Case("llama", "CAUSAL_LM", {"use_bdlora": _bd("llama")}),
    "BD-LoRA of an encoder": Case("bert", "SEQ_CLS", {"use_bdlora": _bd("bert")}),
    "MiCA": Case("bert", "SEQ_CLS", {"init_lora_weights": "mica", "target_modules": ["query", "word_embeddings"]}),
    "orthogonal": Case("bert", "SEQ_CLS", {"init_lora_weights": "orthogonal"}),
    "EVA": Case("bert", "SEQ_CLS", {"init_lora_weights": "eva"}),
    "Gaussian": Case("bert", "SEQ_CLS", {"init_lora_weights": "gaussian"}),
    "VeLoRA": Case("llama", "CAUSAL_LM", {"velora_config": VeloraConfig(num_groups=2)}),
    "MonteCLoRA": Case("llama", "CAUSAL_LM", {"monteclora_config": MontecloraConfig()}),
    "Conv1D": Case("gpt2", "CAUSAL_LM", {"bias": "all"}),
    "layers": Case("bert", "SEQ_CLS", {"layers_to_transform": [1], "target_modules": ["query", "value"]}),
    "layers by pattern": Case(
        "llama", "CAUSAL_LM", {"layers_to_transform": 0, "layers_pattern": "layers", "target_modules": ["q_proj"]}
    ),
    "a regular expression": Case("bert", "SEQ_CLS", {"target_modules": r".*layer\.1\..*(query|dense)"}),
    "all-linear": Case("llama", "CAUSAL_LM", {"target_modules": "all-linear"}),
    "excluded": Case("llama", "CAUSAL_LM", {"exclude_modules": r".*layers\.0\..*"}),
    "excluded by name": Case("llama", "CAUSAL_LM", {"exclude_modules": ["down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_module_answers_as_under_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = save(
        case.family, case.task_type, tmp_path / "adapter", vocab_size=case.vocab_size,
        save_embedding=case.save_embedding, **case.config,
    )  # fmt: skip
    checkpoint = read_checkpoint(folder, spec_of(case.family), NO_LIMIT)
    assert_modules_answer_as_peft(case.family, case.task_type, folder, checkpoint, vocab_size=case.vocab_size)
