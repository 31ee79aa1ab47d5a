"""The conformance matrix: what of PEFT's LoRA is proved on which architecture, for which task.

A field of a case's LoraConfig may be a `Given`, which is asked for its value per base and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

from lora_runtime.types import TokenSequence
from tests.conformance.families import FAMILIES, Base

Given = Callable[[Base, int], Any]


class Layout(StrEnum):
    """How an adapter lies in its folder."""

    PLAIN = "plain"  # as PEFT saves it
    NAMED = "named"  # in a sub-folder of the adapter's name
    SHARDED = "sharded"  # in two safetensors files with an index; PEFT reads the unsharded copy


@dataclass(frozen=True)
class Case:
    """Two adapters of one LoraConfig that differ in rank, weights and number of labels."""

    family: str
    variant: str
    task: str = "SEQ_CLS"
    lora: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, int] = (
        3,
        6,
    )  # PiSSA, KaSA: where singular values lie apart, since PEFT's SVD has single precision
    labels: tuple[int, int] = (3, 5)
    layout: Layout = Layout.PLAIN
    new_tokens: int = 0  # rows by which the vocabulary was resized
    reorder: tuple[str, ...] = ()  # fields whose entries are written in the config's order, which saving would sort
    edits: Mapping[str, Any] = field(default_factory=dict)  # of the saved config, which PEFT reads as edited
    dtype: str = "float32"  # of the saved tensors
    may_be_refused: bool = False  # with the reason, in place of an answer: PEFT ignores part of it, or no leaf has it

    @property
    def id(self) -> str:
        return f"{self.family}-{self.task.lower()}-{self.variant}"

    def config(self, base: Base, seed: int) -> dict[str, Any]:
        """The fields of LoraConfig for the adapter of one seed, 0 or 1."""
        rank = self.ranks[seed]
        fields: dict[str, Any] = {
            "r": rank,
            "lora_alpha": 2 * rank + 1,
            "target_modules": list(base.family.attention),
            "fan_in_fan_out": base.family.fan_in_fan_out,
        }
        given = {key: value(base, seed) if callable(value) else value for key, value in self.lora.items()}
        return fields | given

    def num_labels(self, seed: int) -> int | None:
        return self.labels[seed] if self.task in ("SEQ_CLS", "TOKEN_CLS") else None

    def sequences(self, base: Base, seed: int) -> tuple[TokenSequence, ...]:
        """The texts, with what the variant needs to be seen in them."""
        if "alora_invocation_tokens" in self.lora:
            return (*base.sequences, *_invoking(base, invocation(base, seed)))
        if self.new_tokens:
            return (*base.sequences, *_with_new_tokens(base, self.new_tokens))
        return base.sequences


def linears(base: Base, seed: int) -> list[str]:
    """Every linear layer of a block."""
    del seed
    return list(base.family.linears)


def also(*names: str) -> Given:
    """The attention projections and further modules."""
    return lambda base, _seed: [*base.family.attention, *names]


def with_words(base: Base, seed: int) -> list[str]:
    """The attention projections and the word embedding."""
    del seed
    return [*base.family.attention, base.family.words]


def words(base: Base, seed: int) -> list[str]:
    """The word embedding alone."""
    del seed
    return [base.family.words]


def some_tokens(base: Base, seed: int) -> list[int]:
    """Indices of tokens that the texts have."""
    return base.pick_ids(3, seed)


def tokens_of(*modules: str) -> Given:
    """Indices of tokens of the texts, for each of the embeddings named."""
    return lambda base, seed: {module: base.pick_ids(3, seed + i) for i, module in enumerate(modules)}


def invocation(base: Base, seed: int) -> list[int]:
    """An invocation sequence of two or three tokens; that of one seed ends that of the other."""
    first, second, third = base.pick_ids(3, 7)
    return [second, third] if seed == 0 else [first, second, third]


def _invoking(base: Base, tokens: list[int]) -> tuple[TokenSequence, ...]:
    """Texts that invoke at their start, their end and twice, and one that breaks off within the invocation."""
    ids, call = base.sequences[1].input_ids, tuple(tokens)
    spread = [call + ids, ids + call, ids[:4] + call + ids[4:9] + call + ids[9:], ids[:6] + call[:-1]]
    return tuple(TokenSequence(s, None) for s in spread)


def _with_new_tokens(base: Base, count: int) -> tuple[TokenSequence, ...]:
    """A text with every added token, the last one at its end."""
    ids = base.sequences[1].input_ids
    added = tuple(range(base.vocab_size, base.vocab_size + count))
    types = None if base.sequences[1].token_type_ids is None else (0,) * (len(ids) + count)
    return (TokenSequence(ids[:3] + added[:-1] + ids[3:] + added[-1:], types),)


def _block_diagonal(base: Base, seed: int) -> BdLoraConfig:
    del seed
    outputs = [name for name in base.family.linears if name in ("o_proj", "down_proj", "output.dense")]
    inputs = [name for name in base.family.linears if name not in (*outputs, "attention.output.dense")]
    return BdLoraConfig(target_modules_bd_a=outputs, target_modules_bd_b=inputs, nblocks=2, match_strict=False)


_DORA = {"use_dora": True, "target_modules": linears}
_ALORA = {"alora_invocation_tokens": invocation, "target_modules": linears}
_BD = {"use_bdlora": _block_diagonal, "target_modules": linears}
_KASA = {"kasa_config": KasaConfig(), "target_modules": linears}
_TIE = {"ensure_weight_tying": True}

_BERT = [
    Case("bert", "plain"),
    Case("bert", "rslora", lora={"use_rslora": True}),
    Case("bert", "wide-rank", ranks=(36, 64), lora={"target_modules": linears}),
    Case(
        "bert",
        "rank-pattern",
        lora={
            "rank_pattern": {".*value": 5, r"encoder\.layer\.1\..*": 2, "layer.1.attention.self.value": 9},
            "target_modules": linears,
        },
    ),
    Case(
        "bert",
        "alpha-pattern",
        reorder=("alpha_pattern",),
        lora={
            "alpha_pattern": {"value": 40, "layer.1.attention.self.value": 1, "dense": 9, "output.dense": 2},
            "target_modules": linears,
        },
    ),
    Case(
        "bert",
        "rank-and-alpha-pattern-rslora",
        lora={"use_rslora": True, "rank_pattern": {"query": 7}, "alpha_pattern": {r"layer\.0\..*": 30}},
    ),
    Case("bert", "lora-bias", lora={"lora_bias": True, "target_modules": linears}),
    Case("bert", "bias-lora-only", lora={"bias": "lora_only", "target_modules": linears}),
    Case("bert", "bias-all", lora={"bias": "all"}),
    Case("bert", "lora-bias-and-bias-all", lora={"lora_bias": True, "bias": "all"}),
    Case("bert", "dora", lora=_DORA),
    Case("bert", "dora-rslora", lora={**_DORA, "use_rslora": True}),
    Case("bert", "dora-bias-lora-only", lora={**_DORA, "bias": "lora_only"}),
    Case("bert", "dora-bias-all", lora={**_DORA, "bias": "all"}),
    Case("bert", "dora-embedding", lora={"use_dora": True, "target_modules": with_words}),
    Case("bert", "dora-pooler", lora={"use_dora": True, "target_modules": also("pooler.dense")}),
    Case("bert", "embedding", lora={"target_modules": with_words}),
    Case(
        "bert",
        "embedding-rslora-all-tables",
        lora={
            "use_rslora": True,
            "target_modules": also("word_embeddings", "position_embeddings", "token_type_embeddings"),
        },
    ),
    Case("bert", "pooler", lora={"target_modules": also("pooler.dense")}),
    Case("bert", "lora-bias-pooler", lora={"target_modules": also("pooler.dense"), "lora_bias": True}),
    Case("bert", "bias-lora-only-pooler", lora={"target_modules": also("pooler.dense"), "bias": "lora_only"}),
    Case("bert", "saved-pooler", lora={"modules_to_save": ["pooler"]}),
    Case("bert", "saved-norms", lora={"modules_to_save": ["LayerNorm"]}),
    Case("bert", "saved-linear", lora={"modules_to_save": ["layer.1.intermediate.dense"]}),
    Case("bert", "saved-embedding", lora={"modules_to_save": words}),
    Case("bert", "trainable-tokens", lora={"trainable_token_indices": some_tokens}),
    Case("bert", "trainable-tokens-by-name", lora={"trainable_token_indices": tokens_of("word_embeddings")}),
    Case(
        "bert",
        "trainable-tokens-dora-bias-all",
        lora={**_DORA, "bias": "all", "trainable_token_indices": some_tokens},
    ),
    Case("bert", "pissa", ranks=(2, 4), lora={"init_lora_weights": "pissa", "target_modules": linears}),
    Case("bert", "pissa-rslora", ranks=(2, 4), lora={"init_lora_weights": "pissa", "use_rslora": True}),
    Case("bert", "pissa-rank-pattern", ranks=(3, 4), lora={"init_lora_weights": "pissa", "rank_pattern": {"value": 5}}),
    Case("bert", "olora", lora={"init_lora_weights": "olora", "target_modules": linears}),
    Case("bert", "kasa", ranks=(3, 10), lora=_KASA),
    Case("bert", "kasa-rslora", ranks=(2, 6), lora={**_KASA, "use_rslora": True}),
    Case("bert", "bd-lora", ranks=(4, 6), lora=_BD),
    Case("bert", "mica", lora={"init_lora_weights": "mica", "target_modules": linears}),
    Case("bert", "mica-embedding", lora={"init_lora_weights": "mica", "target_modules": with_words}),
    Case("bert", "orthogonal", ranks=(4, 6), lora={"init_lora_weights": "orthogonal"}),
    Case("bert", "eva", lora={"init_lora_weights": "eva"}),
    Case("bert", "gaussian", lora={"init_lora_weights": "gaussian"}),
    Case("bert", "layers-to-transform", lora={"layers_to_transform": [1]}),
    Case("bert", "regex-targets", lora={"target_modules": r".*layer\.[01]\.attention\.self\.(query|value)"}),
    Case("bert", "excluded-modules", lora={"target_modules": linears, "exclude_modules": r".*layer\.0\..*"}),
    Case("bert", "named", layout=Layout.NAMED),
    Case("bert", "sharded", layout=Layout.SHARDED, lora={"target_modules": linears}),
    Case("bert", "resized-vocabulary", new_tokens=3),
    Case("bert", "untyped", edits={"task_type": None}),
    Case("bert", "of-the-future", edits={"a_field_of_the_future": None, "peft_version": "9.0"}),
    Case("bert", "float16", dtype="float16", lora={**_DORA, "bias": "all"}),
    Case("bert", "bfloat16", dtype="bfloat16", lora={"target_modules": with_words}),
    Case("bert", "regression", labels=(1, 1)),
    Case("bert", "plain", "TOKEN_CLS"),
    Case("bert", "dora-bias-all", "TOKEN_CLS", lora={**_DORA, "bias": "all"}),
    Case("bert", "plain", "QUESTION_ANS"),
    Case("bert", "trainable-tokens", "QUESTION_ANS", lora={"trainable_token_indices": some_tokens}),
    Case("bert", "plain", "FEATURE_EXTRACTION"),
    Case("bert", "dora-saved-norms", "FEATURE_EXTRACTION", lora={**_DORA, "modules_to_save": ["LayerNorm"]}),
    Case("bert", "embedding", "FEATURE_EXTRACTION", lora={"target_modules": with_words}),
]
_ENCODERS = [
    Case("roberta", "linears", lora={"target_modules": linears}),
    Case("roberta", "dora-bias-lora-only", lora={**_DORA, "bias": "lora_only"}),
    Case("roberta", "bias-all", lora={"bias": "all"}),
    Case("roberta", "embeddings", lora={"target_modules": also("word_embeddings", "position_embeddings")}),
    Case(
        "roberta",
        "head-by-lora",
        lora={"target_modules": also("intermediate.dense"), "modules_to_save": ["classifier"]},
    ),
    Case("roberta", "plain", "TOKEN_CLS"),
    Case("roberta", "saved-norms", "QUESTION_ANS", lora={"modules_to_save": ["LayerNorm"]}),
    Case("roberta", "trainable-tokens", "FEATURE_EXTRACTION", lora={"trainable_token_indices": some_tokens}),
    Case("distilbert", "linears", lora={"target_modules": linears}),
    Case("distilbert", "dora", lora=_DORA),
    Case("distilbert", "bias-all", lora={"bias": "all"}),
    Case("distilbert", "plain", "TOKEN_CLS"),
    Case("distilbert", "lora-bias", "QUESTION_ANS", lora={"lora_bias": True}),
    Case("distilbert", "dora-embedding", "FEATURE_EXTRACTION", lora={"use_dora": True, "target_modules": with_words}),
    Case("electra", "linears", lora={"target_modules": linears}),
    Case(
        "electra",
        "dora-embedding",
        lora={"use_dora": True, "target_modules": also("word_embeddings", "embeddings_project")},
    ),
    # PEFT takes its SVD in float32, whose error over all linears of this base is beyond our tolerance
    Case("electra", "pissa", ranks=(4, 5), lora={"init_lora_weights": "pissa"}),
    Case("electra", "saved-projection", "TOKEN_CLS", lora={"modules_to_save": ["embeddings_project"]}),
    Case("electra", "plain", "QUESTION_ANS"),
    Case("electra", "bias-all", "FEATURE_EXTRACTION", lora={"bias": "all"}),
    Case("modernbert", "linears", lora={"target_modules": linears}),
    Case("modernbert", "head", lora={"target_modules": also("head.dense")}),
    Case("modernbert", "saved-head", lora={"modules_to_save": ["head"]}),
    Case("modernbert", "dora", lora=_DORA),
    Case("modernbert", "saved-norms", lora={"modules_to_save": ["mlp_norm", "final_norm"]}),
    Case("modernbert", "embedding", "TOKEN_CLS", lora={"target_modules": with_words}),
    Case("modernbert", "saved-classifier", "QUESTION_ANS", lora={"modules_to_save": ["classifier"]}),
    Case("modernbert", "trainable-tokens", "FEATURE_EXTRACTION", lora={"trainable_token_indices": some_tokens}),
]
_DEBERTAS = [
    Case("deberta", "attention"),
    Case("deberta", "linears", lora={"target_modules": linears}),
    Case("deberta", "dora", lora={"use_dora": True, "target_modules": ["in_proj", "output.dense"]}),
    Case("deberta", "bias-all", lora={"bias": "all"}),
    Case("deberta", "saved-pooler", lora={"modules_to_save": ["pooler"]}),
    Case("deberta", "embedding", "TOKEN_CLS", lora={"target_modules": with_words}),
    Case("deberta", "plain", "QUESTION_ANS", lora={"target_modules": ["in_proj"]}),
    Case("deberta-v3", "attention"),
    Case("deberta-v3", "linears", lora={"target_modules": linears}),
    Case("deberta-v3", "mlp", lora={"target_modules": ["intermediate.dense", "output.dense"]}),
    Case("deberta-v3", "dora", lora=_DORA),
    Case("deberta-v3", "pooler", lora={"target_modules": ["value_proj", "pooler.dense"]}),
    Case("deberta-v3", "relative-embeddings", lora={"target_modules": also("rel_embeddings")}, may_be_refused=True),
    Case(
        "deberta-v3",
        "saved-relative-embeddings",
        lora={"modules_to_save": ["rel_embeddings"]},
        may_be_refused=True,
    ),
    Case("deberta-v3", "saved-norms", lora={"modules_to_save": ["LayerNorm"]}),
    Case("deberta-v3", "plain", "TOKEN_CLS", lora={"target_modules": ["value_proj"]}),
    Case("deberta-v3", "plain", "QUESTION_ANS"),
    Case("deberta-v3", "trainable-tokens", "FEATURE_EXTRACTION", lora={"trainable_token_indices": some_tokens}),
    Case("deberta-v2-conv", "saved-pooler", lora={"target_modules": linears, "modules_to_save": ["pooler"]}),
    Case("deberta-v2-conv", "mlp", "TOKEN_CLS", lora={"target_modules": ["intermediate.dense", "output.dense"]}),
    Case("deberta-v2-conv", "plain", "FEATURE_EXTRACTION"),
]
_MPNET = [
    Case("mpnet", "dora", lora={**_DORA, "target_modules": linears}),
    Case("mpnet", "relative-positions", lora={"target_modules": also("relative_attention_bias")}),
    Case("mpnet", "plain", "TOKEN_CLS"),
    Case("mpnet", "plain", "QUESTION_ANS"),
    Case("mpnet", "bias-all", "FEATURE_EXTRACTION", lora={"bias": "all"}),
]
_OTHER_DECODERS = [
    Case(family, *variant, lora=lora)
    for family in ("qwen3", "mistral", "gpt-neox", "gpt-neo")
    for variant, lora in (
        (("linears",), {"target_modules": linears}),
        (("dora", "TOKEN_CLS"), _DORA),
        (("plain", "QUESTION_ANS"), {}),
        (("trainable-tokens", "FEATURE_EXTRACTION"), {"trainable_token_indices": some_tokens}),
        (("embedding", "CAUSAL_LM"), {"target_modules": with_words}),
    )
]
_OTHER_DECODERS += [Case("qwen3", "saved-norms", "CAUSAL_LM", lora={"modules_to_save": ["q_norm", "k_norm"]})]
_GPT2 = [
    Case("gpt2", "linears", lora={"target_modules": linears}),
    Case("gpt2", "dora", lora=_DORA),
    Case("gpt2", "pissa", ranks=(3, 8), lora={"init_lora_weights": "pissa", "target_modules": linears}),
    Case("gpt2", "mica", lora={"init_lora_weights": "mica", "target_modules": linears}),
    Case("gpt2", "plain", "TOKEN_CLS"),
    Case("gpt2", "plain", "QUESTION_ANS"),
    Case("gpt2", "bias-all", "FEATURE_EXTRACTION", lora={"bias": "all"}),
    Case("gpt2", "linears", "CAUSAL_LM", lora={"target_modules": linears}),
    Case("gpt2", "tables", "CAUSAL_LM", lora={"target_modules": also("wte", "wpe")}),
    Case("gpt2", "lm-head-tied", "CAUSAL_LM", lora={"target_modules": also("lm_head")}),
    Case("gpt2", "saved-lm-head", "CAUSAL_LM", lora={"modules_to_save": ["lm_head"]}),
    Case("gpt2", "saved-embedding", "CAUSAL_LM", lora={"modules_to_save": words}),
    Case("gpt2", "trainable-tokens-tied", "CAUSAL_LM", lora={"trainable_token_indices": some_tokens}),
    Case("gpt2", "trainable-tokens-tied-by-name", "CAUSAL_LM", lora={"trainable_token_indices": tokens_of("wte")}),
    Case("gpt2", "saved-norm", "CAUSAL_LM", lora={"modules_to_save": ["ln_f", "ln_1"]}),
    Case("gpt2", "alora", "CAUSAL_LM", lora=_ALORA),
]
_LLAMA = [
    Case("llama", "linears", lora={"target_modules": linears}),
    Case("llama", "all-linear", lora={"target_modules": "all-linear"}),
    Case("llama", "saved-norms", lora={"modules_to_save": ["norm", "input_layernorm"]}),
    Case("llama", "plain", "FEATURE_EXTRACTION"),
    Case("llama", "plain", "TOKEN_CLS"),
    Case("llama", "plain", "QUESTION_ANS"),
    Case("llama", "plain", "CAUSAL_LM"),
    Case(
        "llama",
        "rslora-lora-bias",
        "CAUSAL_LM",
        lora={"use_rslora": True, "lora_bias": True, "target_modules": linears},
    ),
    Case("llama", "dora-rslora", "CAUSAL_LM", lora={**_DORA, "use_rslora": True}),
    Case("llama", "lm-head", "CAUSAL_LM", lora={"target_modules": also("lm_head")}),
    Case("llama", "dora-lm-head", "CAUSAL_LM", lora={"use_dora": True, "target_modules": also("lm_head")}),
    Case("llama", "lora-bias-lm-head", "CAUSAL_LM", lora={"lora_bias": True, "target_modules": also("lm_head")}),
    Case("llama", "saved-lm-head", "CAUSAL_LM", lora={"modules_to_save": ["lm_head"]}),
    Case("llama", "embedding", "CAUSAL_LM", lora={"target_modules": with_words}),
    Case("llama", "embedding-and-lm-head", "CAUSAL_LM", lora={"target_modules": also("embed_tokens", "lm_head")}),
    Case("llama", "dora-embedding", "CAUSAL_LM", lora={"use_dora": True, "target_modules": with_words}),
    Case("llama", "saved-embedding-and-lm-head", "CAUSAL_LM", lora={"modules_to_save": ["embed_tokens", "lm_head"]}),
    Case("llama", "trainable-tokens", "CAUSAL_LM", lora={"trainable_token_indices": some_tokens}),
    Case("llama", "trainable-tokens-by-name", "CAUSAL_LM", lora={"trainable_token_indices": tokens_of("embed_tokens")}),
    Case("llama", "alora", "CAUSAL_LM", lora=_ALORA),
    Case("llama", "alora-lm-head", "CAUSAL_LM", lora={**_ALORA, "target_modules": also("lm_head")}),
    Case(
        "llama",
        "alora-rslora-patterns",
        "CAUSAL_LM",
        lora={**_ALORA, "use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    ),
    Case("llama", "olora", "CAUSAL_LM", lora={"init_lora_weights": "olora"}),
    Case("llama", "kasa", "CAUSAL_LM", ranks=(6, 9), lora=_KASA),
    Case("llama", "bd-lora", "CAUSAL_LM", ranks=(4, 6), lora=_BD),
    Case("llama", "layers-to-transform", "CAUSAL_LM", lora={"layers_to_transform": [1], "target_modules": linears}),
    Case("llama", "resized-vocabulary", "CAUSAL_LM", new_tokens=3),
    Case("llama", "named", layout=Layout.NAMED),
]
_TIED = [
    Case("qwen2", "bias-lora-only", lora={"bias": "lora_only"}),
    Case("qwen2", "dora-bias-lora-only", lora={**_DORA, "bias": "lora_only"}),
    Case("qwen2", "plain", "FEATURE_EXTRACTION"),
    Case("qwen2", "linears", "CAUSAL_LM", lora={"target_modules": linears}),
    Case("qwen2", "bias-all", "CAUSAL_LM", lora={"bias": "all"}),
    Case("qwen2", "trainable-tokens-tied", "CAUSAL_LM", lora={"trainable_token_indices": some_tokens}),
    Case("qwen2", "lm-head-tied", "CAUSAL_LM", lora={"target_modules": also("lm_head")}),
    Case("qwen2", "embedding-tied", "CAUSAL_LM", lora={"target_modules": with_words}),
    Case("qwen2", "saved-embedding-tied", "CAUSAL_LM", lora={"modules_to_save": words}),
    Case("qwen2", "saved-lm-head-tied", "CAUSAL_LM", lora={"modules_to_save": ["lm_head"]}),
    Case("qwen2", "resized-vocabulary", "CAUSAL_LM", new_tokens=3),
    Case("qwen2", "kept-tied-embedding", "CAUSAL_LM", lora={**_TIE, "target_modules": with_words}),
    Case("qwen2", "kept-tied-saved-embedding", "CAUSAL_LM", lora={**_TIE, "modules_to_save": words}),
    Case("gemma3", "linears", lora={"target_modules": linears}),
    Case("gemma3", "plain", "FEATURE_EXTRACTION"),
    Case("gemma3", "plain", "CAUSAL_LM"),
    Case("gemma3", "scaled-embedding", "CAUSAL_LM", lora={"target_modules": with_words}),
    Case("gemma3", "dora-scaled-embedding", "CAUSAL_LM", lora={"use_dora": True, "target_modules": with_words}),
    Case("gemma3", "saved-scaled-embedding", "CAUSAL_LM", lora={"modules_to_save": words}),
    Case("gemma3", "trainable-tokens-scaled", "CAUSAL_LM", lora={"trainable_token_indices": some_tokens}),
    Case("gemma3", "saved-norms", "CAUSAL_LM", lora={"modules_to_save": ["pre_feedforward_layernorm"]}),
    Case("gemma3", "saved-head-norms", "CAUSAL_LM", lora={"modules_to_save": ["q_norm"]}, may_be_refused=True),
    Case("gemma3", "dora", "CAUSAL_LM", lora=_DORA),
    Case("gemma3", "alora", "CAUSAL_LM", lora=_ALORA),
]  # fmt: skip

CASES: tuple[Case, ...] = tuple(
    sorted(
        [*_BERT, *_ENCODERS, *_DEBERTAS, *_MPNET, *_GPT2, *_LLAMA, *_TIED, *_OTHER_DECODERS],
        key=lambda case: list(FAMILIES).index(case.family),
    )
)
assert len({case.id for case in CASES}) == len(CASES)


def case_params() -> list[object]:
    """The cases as pytest parameters."""
    return [pytest.param(case, id=case.id) for case in CASES]
