"""Adapters trained on a GGUF file are those of its dequantised weights, and the same file serves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_runtime.batch import Row
from lora_runtime.runtime import Runtime
from lora_runtime.train.run import train
from lora_runtime.train.settings import DataFiles, LoraChoices, Optimisation, RunSettings, TrainSettings
from lora_runtime.train.tasks.options import ClassifyOptions, EmbedOptions, PromptOptions, TaskOptions
from lora_runtime.types import TokenSequence
from tests.gguf_files import write_llama
from tests.oracle import TaskOracle
from tests.training_rows import pairs, topics, translations, write

TASKS: dict[str, tuple[TaskOptions, Callable[[int, int], list[dict[str, Any]]], str]] = {
    "classify": (ClassifyOptions(), topics, "SEQ_CLS"),
    "embed": (EmbedOptions(), pairs, "FEATURE_EXTRACTION"),
    "translate": (
        PromptOptions(template="say {text} =", columns={"text": "source"}, completion="target"),
        translations,
        "CAUSAL_LM",
    ),
}


def test_every_task_of_a_gguf_base_is_served_from_the_file_as_peft_answers(tmp_path: Path) -> None:
    file, folder = tmp_path / "tiny.gguf", tmp_path / "whole"
    write_llama(file, folder=folder)
    sequence = TokenSequence((5, 9, 31, 77, 40), None)
    with Runtime(file) as runtime:
        for name, (options, make, peft_type) in TASKS.items():
            rows = write(tmp_path / f"{name}.jsonl", make(24, 1))
            settings = TrainSettings(
                str(file),
                options,
                DataFiles(rows, valid_share=0.2, max_length=48),
                RunSettings(tmp_path / "out" / name, threads=1, report=False),
                LoraChoices(rank=4),
                Optimisation(epochs=1, batch_size=8, learning_rate=5e-3),
            )
            report = train(settings)
            info = runtime.load(settings.run.out, name=name)
            resident = runtime.engine.hold([info.id])[info.id]
            labels = len(report.plan.labels) or None
            oracle = TaskOracle(folder, settings.run.out, peft_type, num_labels=labels, last_token=True)
            row = Row(sequence, resident, report.plan.task)
            (found,) = runtime.engine.call(lambda row=row: runtime.runner.run([row]))
            assert torch.allclose(found, oracle.answer(sequence), atol=1e-4), name
