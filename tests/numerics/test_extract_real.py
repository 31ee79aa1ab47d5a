"""Rank 16 of a model that was fully fine-tuned on real texts keeps its accuracy.

`MULTILORA_DATA=path/to/data pytest -m slow tests/numerics/test_extract_real.py`, where the folder has
`ag_news/train.csv` and `ag_news/test.csv` with the columns text and label. Three minutes on one core.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_runtime.runtime import Runtime
from lora_runtime.svd.extract import extract_adapter
from lora_runtime.svd.settings import ExtractSettings, RankRule
from lora_runtime.train.rows.classify import ClassifySchema, read_classify_rows

DATA = Path(os.environ.get("MULTILORA_DATA", "")) / "ag_news"
TRAIN_ROWS, TEST_ROWS, BATCH, EPOCHS, MAX_TOKENS = 2000, 500, 16, 1, 40
LABELS = ("Business", "Sci/Tech", "Sports", "World")


@dataclass(frozen=True)
class Rows:
    texts: list[str]
    labels: torch.Tensor


def read(name: str, limit: int) -> Rows:
    examples = read_classify_rows(DATA / name, ClassifySchema())
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    chosen = [examples[i] for i in order]
    return Rows([row.text for row in chosen], torch.tensor([LABELS.index(row.labels[0]) for row in chosen]))


def fine_tune(base: Path, rows: Rows, out: Path) -> None:
    """Every parameter, by AdamW with a linear schedule."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=dict(enumerate(LABELS))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    steps = EPOCHS * (len(rows.texts) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    for _ in range(EPOCHS):
        for index in torch.randperm(len(rows.texts)).split(BATCH)[: steps // EPOCHS]:
            texts = [rows.texts[i] for i in index.tolist()]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            loss = model(**batch, labels=rows.labels[index]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def accuracy_of_model(folder: Path, rows: Rows) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(rows.texts), 50):
            batch = tokenizer(rows.texts[start : start + 50], padding=True, truncation=True, return_tensors="pt")
            found.append(model(**batch).logits.argmax(dim=1))
    return (torch.cat(found) == rows.labels).float().mean().item()


def accuracy_of_adapter(runtime: Runtime, folder: Path, rows: Rows) -> float:
    runtime.load(folder)
    answers: Sequence[str] = [p.label for p in runtime.classify(folder.name, rows.texts, truncate=True)]
    return sum(a == LABELS[t] for a, t in zip(answers, rows.labels.tolist(), strict=True)) / len(answers)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="MULTILORA_DATA names no folder with ag_news")
def test_rank_16_keeps_the_accuracy_of_a_fine_tuned_classifier(tmp_path: Path, encoder_path: Path) -> None:
    fine_tune(encoder_path, read("train.csv", TRAIN_ROWS), tmp_path / "tuned")
    test = read("test.csv", TEST_ROWS)
    whole = accuracy_of_model(tmp_path / "tuned", test)
    figures = [f"fine-tuned: accuracy {whole:.4f}"]
    accuracies: dict[str, float] = {}
    rules = {"rank-4": RankRule(rank=4), "rank-16": RankRule(rank=16)}
    with Runtime(encoder_path) as runtime:
        for name, rule in rules.items():
            report = extract_adapter(ExtractSettings(encoder_path, tmp_path / "tuned", tmp_path / name, rule))
            accuracies[name] = accuracy_of_adapter(runtime, tmp_path / name, test)
            summary = report.summary
            size = f"{summary.num_bytes / 2**20:.1f} MiB, energy {summary.energy:.3f}, {report.seconds:.1f} s"
            figures.append(f"{name}: accuracy {accuracies[name]:.4f}, {accuracies[name] / whole:.4f} of it; {size}")
    print("\n".join(figures))
    assert whole > 0.8
    assert accuracies["rank-16"] >= 0.97 * whole
