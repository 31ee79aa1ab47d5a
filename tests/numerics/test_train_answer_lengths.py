"""Validation rows of question answering in several batches, the longest of one shorter than that of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_runtime.train.run import train
from lora_runtime.train.settings import DataFiles, LoraChoices, Optimisation, RunSettings, TrainSettings
from lora_runtime.train.tasks.options import AnswerOptions
from tests.training import make_bases

NUM_LONG, NUM_SHORT = 32, 8  # a batch of validation rows, and the beginning of another


def write_questions(path: Path) -> Path:
    rows = [
        {"question": "which metal", "context": f"{'red ' * (20 if number < NUM_LONG else 2)}iron", "answer": "iron"}
        for number in range(NUM_LONG + NUM_SHORT)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_of_batches_of_other_lengths_are_found(tmp_path: Path) -> None:
    rows = write_questions(tmp_path / "rows.jsonl")
    settings = TrainSettings(
        make_bases(tmp_path / "bases", ("steady",))["steady"],
        AnswerOptions(),
        DataFiles(rows, rows, max_length=48),
        RunSettings(tmp_path / "reader", threads=1, report=False),
        LoraChoices(rank=4, dropout=0.0),
        Optimisation(learning_rate=1e-2, epochs=6, batch_size=8),
    )
    assert train(settings).best.metrics["exact_match"] == pytest.approx(1.0)
