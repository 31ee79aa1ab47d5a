"""Other encoders: served exactly, heads and all, or refused at load with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from lora_runtime.errors import AdapterRejected, BaseModelUnsupported, TextTooLong
from lora_runtime.model.load import load_base
from lora_runtime.runtime import Runtime
from lora_runtime.types import Task
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
    # with attention of their own: padded
    "MPNet": ("MPNetModel", SMALL, ["q", "v", "intermediate.dense"]),
    "Deberta": (
        "DebertaForSequenceClassification",  # with its pooler
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        ["in_proj", "pos_proj"],
    ),
    "DebertaV2": (
        "DebertaV2ForSequenceClassification",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
        ["query_proj", "value_proj"],
    ),
    "ModernBert": ("ModernBertForMaskedLM", {**SMALL, **SPECIAL, "local_attention": 8}, ["Wqkv", "Wo", "head.dense"]),
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
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier.")}
    model.save_pretrained(folder, state_dict=state)
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


def test_a_base_whose_sequences_meet_is_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither packed nor padded is exact when attention sees neither lengths nor mask."""

    def blind(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr("transformers.models.bert.modeling_bert.create_bidirectional_mask", blind)
    monkeypatch.setattr("lora_runtime.model.probe._counted", lambda *_: False)
    with pytest.raises(BaseModelUnsupported, match="requests could see each other"):
        load_base(tiny_bert)


def test_a_task_whose_head_is_not_exact_is_not_served(tmp_path: Path, encoder_path: Path) -> None:
    """ALBERT's pooler is no module of its own kind: the head would answer something else."""
    base = save_base("Albert", "AlbertModel", {**SMALL, "embedding_size": 16}, tmp_path / "base", encoder_path)
    spec = load_base(base).spec
    assert Task.CLASSIFY not in spec.heads
    assert "other logits" in spec.unserved[Task.CLASSIFY]
    adapter = make_adapter(base, tmp_path / "news", targets=["query"])
    with Runtime(base) as runtime, pytest.raises(AdapterRejected, match="other logits"):
        runtime.load(adapter)


def test_texts_stay_within_the_length_that_changes_no_other_text(tmp_path: Path, encoder_path: Path) -> None:
    """Phi-3's "longrope" turns by other angles once one text of a batch is longer than the original model's."""
    angles = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0, "rope_theta": 10000.0}
    original = {"original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", **original, **angles}
    fields = {**SMALL, **SPECIAL, **original, "rope_parameters": rope, "sliding_window": 4096}
    base = save_base("Phi3", "Phi3ForCausalLM", fields, tmp_path / "base", encoder_path)
    with Runtime(base) as runtime:
        (short,) = runtime.embed("base", ["Short."])
        with pytest.raises(TextTooLong):
            runtime.embed("base", ["Short.", "long " * 20])
        together = runtime.embed("base", ["Short.", "long " * 20], truncate=True)
        assert torch.allclose(torch.tensor(together[0]), torch.tensor(short), atol=1e-5)


def test_a_module_that_computes_from_more_than_its_input_is_not_served(tmp_path: Path, encoder_path: Path) -> None:
    """BioGPT's positions take the whole batch's position ids beside their input."""
    base = save_base("BioGpt", "BioGptForCausalLM", {**SMALL, **SPECIAL}, tmp_path / "base", encoder_path)
    refused = make_adapter(base, tmp_path / "news", targets=["q_proj"], modules_to_save=["score", "embed_positions"])
    with Runtime(base) as runtime:
        with pytest.raises(AdapterRejected, match="not served per adapter"):
            runtime.load(refused)
        runtime.load(make_adapter(base, tmp_path / "plain", targets=["q_proj"], bias="all"))
        assert runtime.classify("plain", ["Short."])


def test_norms_of_nine_heads_are_not_taken_for_norms_of_tokens(tmp_path: Path, encoder_path: Path) -> None:
    heads = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 9, "head_dim": 4}
    base = save_base("Gemma3Text", "Gemma3ForCausalLM", {**SMALL, **SPECIAL, **heads}, tmp_path / "base", encoder_path)
    adapter = make_adapter(base, tmp_path / "news", targets=["q_proj"], modules_to_save=["score", "q_norm"])
    with Runtime(base) as runtime, pytest.raises(AdapterRejected, match="not served per adapter"):
        runtime.load(adapter)


def test_a_base_whose_code_fails_is_refused_as_any_other(tmp_path: Path, encoder_path: Path) -> None:
    """SqueezeBERT calls its pooler even where there is none."""
    base = save_base(
        "SqueezeBert", "SqueezeBertModel", {**SMALL, "embedding_size": 32}, tmp_path / "base", encoder_path
    )
    with pytest.raises(BaseModelUnsupported, match="base base: its architecture cannot be run here"):
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
