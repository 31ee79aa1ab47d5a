"""What is not served is refused by name, from the one registry that the README's table is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.plan import plan_adapter, read_card
from lora_runtime.adapters.variants import VARIANTS, support_rows, support_table
from lora_runtime.errors import AdapterRejected
from tests.unit.base_specs import WIDTH, spec_of
from tests.unit.peft_folders import NO_LIMIT, change_config, change_tensors, drop, save

# field, value → code, and words of the reason
REFUSED_FIELDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "another method": ({"peft_type": "LOHA"}, "NOT_LORA", "save_as_lora"),
    "no method": ({"peft_type": None}, "NOT_LORA", "only LORA"),
    "random PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "PISSA_RANDOMISED", "converted"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "LOFTQ_UNCONVERTED", "quantised"),
    "CorDA": ({"init_lora_weights": "corda"}, "CORDA_UNCONVERTED", "converted"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "LORA_GA_UNCONVERTED", "converted"),
    "an unknown init": ({"init_lora_weights": "magic"}, "INIT_UNKNOWN", "magic"),
    "QALoRA": ({"use_qalora": True}, "QALORA", "GPTQ"),
    "MoE parameters": ({"target_parameters": ["mlp.experts"]}, "TARGET_PARAMETERS", "target_modules"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "LAYER_REPLICATION", "depth"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "ARROW", "routes"),
    "merged projections": ({"enable_lora": [True, False, True]}, "MERGED_LINEAR", "PEFT 0.3"),
    "two variants": ({"use_dora": True, "kasa_config": {}}, "VARIANT_CONFLICT", "no such combination"),
    "lora_bias with DoRA": ({"use_dora": True, "lora_bias": True}, "VARIANT_CONFLICT", "DoRA"),
    "lora_bias with an init": ({"init_lora_weights": "eva", "lora_bias": True}, "VARIANT_CONFLICT", "eva"),
    "lora_bias with aLoRA": ({"alora_invocation_tokens": [1], "lora_bias": True}, "VARIANT_CONFLICT", "invocation"),
    "PiSSA with aLoRA": (
        {"alora_invocation_tokens": [1], "init_lora_weights": "pissa"}, "VARIANT_CONFLICT", "invocation",
    ),
    "PiSSA with KaSA": ({"kasa_config": {}, "init_lora_weights": "pissa"}, "VARIANT_CONFLICT", "KaSA"),
    "layers of a pattern": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "CONFIG_INVALID", "layers_to_transform",
    ),
    "a pattern of layers alone": ({"layers_pattern": "layers"}, "CONFIG_INVALID", "layers_pattern"),
    "a target that is no pattern": ({"target_modules": "("}, "CONFIG_INVALID", "regular expression"),
    "blocks for no list": ({"use_bdlora": {"nblocks": 2}}, "CONFIG_INVALID", "neither list"),
    "blocks that do not divide": (
        {"use_bdlora": {"nblocks": 3, "target_modules_bd_a": ["q_proj", "v_proj"]}}, "CONFIG_INVALID", "divide",
    ),
    "a rank that is none": ({"r": None}, "CONFIG_INVALID", "field r"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("llama", "CAUSAL_LM", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


def refusal(folder: Path, family: str = "llama") -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        read_checkpoint(folder, spec_of(family), NO_LIMIT)
    return caught.value


@pytest.mark.parametrize("case", REFUSED_FIELDS)
def test_a_field_that_is_not_served_is_refused_by_its_own_code(folder: Path, case: str) -> None:
    fields, code, words = REFUSED_FIELDS[case]
    change_config(folder, **fields)
    error = refusal(folder)
    assert (error.code, words in error.message) == (code, True), error.message


def test_every_refusal_of_the_registry_has_a_case_here() -> None:
    refused = {variant.code for variant in VARIANTS if not variant.served}
    assert refused <= {code for _, code, _ in REFUSED_FIELDS.values()}


def test_the_table_says_what_the_code_does() -> None:
    rows = support_rows()
    assert {name for name, _, state, _ in rows if state == "refused"} == {v.name for v in VARIANTS if v.code}
    assert all(text for *_, text in rows)
    assert support_table().count("\n") == len(rows) + 1


def test_fields_at_their_defaults_or_of_old_versions_change_nothing(folder: Path) -> None:
    before = read_card(folder, spec_of("llama"))
    change_config(
        folder, enable_lora=None, merge_weights=False, use_bdlora=False, layer_replication=None, target_parameters=[],
        alora_invocation_tokens=[], rank_pattern=None, use_dora=None, bias=None, init_lora_weights=None,
    )  # fmt: skip
    assert read_card(folder, spec_of("llama")) == before


SPOILED: dict[str, tuple[str, str, dict[str, Any], Callable[[Path], object], str, str]] = {
    "half of an embedding": (
        "llama", "CAUSAL_LM", {"target_modules": ["q_proj", "embed_tokens"]},
        lambda f: drop(f, "lora_embedding_B"), "MISSING_TENSOR", "lora_embedding_B",
    ),
    "a magnitude too many": (
        "llama", "CAUSAL_LM", {"use_dora": True},
        lambda f: change_config(f, use_dora=False), "UNEXPECTED_TENSOR", "lora_magnitude_vector",
    ),
    "a magnitude of another width": (
        "llama", "CAUSAL_LM", {"use_dora": True, "target_modules": ["q_proj"]},
        lambda f: change_tensors(f, lambda t: t.update(
            {key: torch.ones(5) for key in t if key.endswith("lora_magnitude_vector")})),
        "SHAPE_MISMATCH", "lora_magnitude_vector",
    ),
    "a saved norm that is not there": (
        "llama", "CAUSAL_LM", {"modules_to_save": ["norm"]},
        lambda f: drop(f, "model.norm.weight"), "MISSING_TENSOR", "model.norm.weight",
    ),
    "a target by pattern without tensors": (
        "llama", "CAUSAL_LM", {"target_modules": r".*\.(q|v)_proj"},
        lambda f: drop(f, "layers.1.self_attn.v_proj.lora_A.weight", "layers.1.self_attn.v_proj.lora_B.weight"),
        "MISSING_TENSOR", "layers.1.self_attn.v_proj",
    ),
    "a target of all-linear without tensors": (
        "llama", "CAUSAL_LM", {"target_modules": "all-linear"},
        lambda f: (change_config(f, target_modules="all-linear"),
                   drop(f, "layers.1.mlp.up_proj.lora_A.weight", "layers.1.mlp.up_proj.lora_B.weight")),
        "MISSING_TENSOR", "layers.1.mlp.up_proj",
    ),
    "tokens that are not there": (
        "llama", "CAUSAL_LM", {"trainable_token_indices": [1, 2]},
        lambda f: drop(f, "trainable_tokens_delta"), "MISSING_TENSOR", "trainable_token_indices",
    ),
    "tokens that nothing names": (
        "llama", "CAUSAL_LM", {"trainable_token_indices": [1, 2]},
        lambda f: change_config(f, trainable_token_indices=None), "UNEXPECTED_TENSOR", "does not name",
    ),
    "fewer tokens than rows": (
        "llama", "CAUSAL_LM", {"trainable_token_indices": [1, 2]},
        lambda f: change_config(f, trainable_token_indices=[1]), "SHAPE_MISMATCH", "trainable_token_indices",
    ),
    "one token twice": (
        "llama", "CAUSAL_LM", {"trainable_token_indices": [1, 2]},
        lambda f: change_config(f, trainable_token_indices=[1, 1]), "CONFIG_INVALID", "two rows",
    ),
    "a token beyond the table": (
        "llama", "CAUSAL_LM", {"trainable_token_indices": [1, 2]},
        lambda f: change_config(f, trainable_token_indices=[1, 99]), "SHAPE_MISMATCH", "99",
    ),
    "LoRA and tokens of one embedding": (
        "llama", "CAUSAL_LM", {"target_modules": ["q_proj", "embed_tokens"]},
        lambda f: change_tensors(f, lambda t: t.update(
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, WIDTH)})),
        "UNEXPECTED_TENSOR", "beside LoRA",
    ),
    "aLoRA on an embedding": (
        "llama", "CAUSAL_LM", {"target_modules": ["q_proj", "embed_tokens"]},
        lambda f: change_config(f, alora_invocation_tokens=[1]), "VARIANT_CONFLICT", "embedding",
    ),
    "aLoRA of a classifier": (
        "llama", "SEQ_CLS", {},
        lambda f: change_config(f, alora_invocation_tokens=[1]), "TASK_UNSUPPORTED", "CAUSAL_LM",
    ),
    "a grown embedding without an output layer": (
        "llama", "CAUSAL_LM", {"vocab_size": 34, "save_embedding": True},
        lambda f: drop(f, "lm_head.weight"), "MISSING_TENSOR", "34",
    ),
    "tied weights without the tie": (
        "tied-llama", "CAUSAL_LM", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        lambda f: drop(f, "lm_head.lora_A.weight", "lm_head.lora_B.weight", "lm_head.base_layer.weight"),
        "MISSING_TENSOR", "lm_head.lora_A",
    ),
    "KaSA of a whole rank": (
        "llama", "CAUSAL_LM", {"r": 6, "target_modules": ["k_proj"]},
        lambda f: (change_config(f, kasa_config={}, r=6), change_tensors(f, lambda t: t.update(
            {key.replace("lora_A.weight", "lora_diag"): torch.ones(6) for key in t if "lora_A" in key}))),
        "SHAPE_MISMATCH", "KaSA",
    ),
    "KaSA on Conv1D": (
        "gpt2", "CAUSAL_LM", {}, lambda f: change_config(f, kasa_config={}), "VARIANT_CONFLICT", "Conv1D",
    ),
    "a diagonal that is not there": (
        "llama", "CAUSAL_LM", {}, lambda f: change_config(f, kasa_config={}), "MISSING_TENSOR", "lora_diag",
    ),
    "a name in the key": (
        "llama", "CAUSAL_LM", {},
        lambda f: change_tensors(f, lambda t: t.update(
            {key.replace("lora_A.", "lora_A.default."): t.pop(key) for key in list(t) if "lora_A" in key})),
        "UNEXPECTED_TENSOR", "save_pretrained",
    ),
    "a span head of three rows": (
        "bert", "QUESTION_ANS", {},
        lambda f: change_tensors(f, lambda t: t.update({
            "base_model.model.qa_outputs.weight": torch.ones(3, WIDTH),
            "base_model.model.qa_outputs.bias": torch.ones(3)})),
        "SHAPE_MISMATCH", "[2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_tensors_that_are_not_as_the_config_says_are_refused(tmp_path: Path, case: str) -> None:
    family, task_type, config, spoil, code, words = SPOILED[case]
    folder = save(family, task_type, tmp_path / "adapter", **config)
    spoil(folder)
    error = refusal(folder, family)
    assert (error.code, words in error.message) == (code, True), error.message


def test_registration_refuses_what_can_be_known_without_values(folder: Path) -> None:
    drop(folder, "layers.0.self_attn.q_proj.lora_B.weight")
    with pytest.raises(AdapterRejected, match="other half"):
        read_card(folder, spec_of("llama"))


def test_all_problems_are_found_when_they_are_collected(folder: Path) -> None:
    change_config(folder, use_qalora=True, init_lora_weights="corda", from_the_future=1)
    drop(folder, "layers.0.self_attn.q_proj.lora_B.weight", "layers.1.self_attn.v_proj.lora_A.weight")
    change_tensors(folder, lambda t: t.update({"base_model.model.model.nothing.lora_A.weight": torch.ones(4, 4)}))
    findings = Findings(collect=True)
    plan = plan_adapter(folder, spec_of("llama"), findings)
    assert plan is not None
    codes = [problem.code for problem in findings.problems]
    assert codes.count("MISSING_TENSOR") >= 2
    assert {"QALORA", "CORDA_UNCONVERTED", "FOREIGN_BASE"} <= set(codes)
    assert any("from_the_future" in warning for warning in findings.warnings)


def test_without_a_base_a_folder_tells_its_modules_and_ranks(folder: Path) -> None:
    plan = plan_adapter(folder, None, Findings())
    assert plan is not None
    assert plan.card is None
    assert {module.rank for module in plan.modules} == {4}
    assert {module.scaling for module in plan.modules} == {1.5}
    assert [v.name for v in plan.variants] == []
    assert plan.num_parameters == sum(ref.size for ref in plan.tensors)


def test_biases_that_are_promised_and_missing_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save("bert", "SEQ_CLS", tmp_path / "adapter", bias="lora_only", target_modules=["query"])
    drop(folder, "base_layer.bias")
    read_card(folder, spec_of("bert"))
    assert "2 biases are missing" in caplog.text


def test_an_adapter_of_an_output_layer_that_its_task_does_not_run_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save("llama", "CAUSAL_LM", tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    (folder / "multilora.json").write_text('{"task": "embed"}')
    base = spec_of("llama")
    read_card(folder, base)
    assert "lm_head" in caplog.text
    assert "lm_head" not in {weights.site.name for weights in read_checkpoint(folder, base, NO_LIMIT).sites}
