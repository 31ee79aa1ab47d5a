"""The demo's adapters: trained here, and judged under PEFT alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lora_runtime.adapters.metadata import read_metadata
from lora_runtime.train import run
from lora_runtime.train.progress import TrainObserver, TrainReport
from lora_runtime.train.settings import DataFiles, LoraChoices, Optimisation, RunSettings, TrainSettings
from lora_runtime.train.tasks.options import ClassifyOptions
from server.demo.samples import RECIPES, Sample


@dataclass(frozen=True, slots=True)
class Trained:
    """One adapter and what PEFT alone makes of its held-out rows."""

    sample: Sample
    report: TrainReport
    peft_accuracy: float
    majority: float  # accuracy of always answering the held-out rows' most frequent label

    @property
    def name(self) -> str:
        return adapter_name(self.sample)


def adapter_name(sample: Sample) -> str:
    """The name it is served under."""
    return sample.name.replace("_", "-")


def settings_for(sample: Sample, base: str, folder: Path, threads: int) -> TrainSettings:
    """The sample's own recipe; its training rows are written beside the adapter's folder."""
    recipe = RECIPES[sample.name]
    out = folder / adapter_name(sample)
    return TrainSettings(
        base,
        ClassifyOptions(),
        DataFiles(sample.write_train_csv(folder), max_length=recipe.max_length),
        RunSettings(out, threads=threads, report=False, base_name="all-MiniLM-L6-v2"),
        LoraChoices(recipe.rank),
        Optimisation(recipe.learning_rate, epochs=recipe.epochs, batch_size=recipe.batch_size),
    )


def train(sample: Sample, settings: TrainSettings, observer: TrainObserver) -> Trained:
    """Train one adapter and measure it under PEFT."""
    report = run.train(settings, observer)
    texts = [row.text for row in sample.test]
    wanted = [row.label for row in sample.test]
    answers = _peft_answers(settings.base, report.out, texts, settings.data.max_length)
    frequent = max(wanted.count(label) for label in sample.labels)
    return Trained(sample, report, accuracy(answers, wanted), frequent / len(wanted))


def accuracy(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of answers that are right, 0 to 1."""
    return sum(a == w for a, w in zip(answers, wanted, strict=True)) / len(wanted)


def _peft_answers(base: str, folder: Path, texts: list[str], max_length: int) -> list[str]:
    metadata = read_metadata(folder)
    assert metadata is not None and metadata.labels is not None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(metadata.labels))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT's own use
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers: list[str] = []
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            encoded = tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            answers += [metadata.labels[i] for i in adapted(**encoded).logits.argmax(-1).tolist()]
    return answers
