"""What an adapter and its untuned base make of a test split, and a few of their answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_runtime.train.metrics.spans import score_spans
from lora_runtime.train.metrics.texts import score_texts
from tests.recipes.cases import PROMPT
from tests.recipes.rows import Row

NUM_EXAMPLES = 5
_BATCH = 16


def classified(found: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    return {"accuracy": sum(label in row.wanted for label, row in zip(found, rows, strict=True)) / len(rows)}


def constant(rows: Sequence[Row]) -> dict[str, float]:
    """Of always the commonest label: a base without a trained head has no other answer."""
    wanted = [row.wanted[0] for row in rows]
    return {"accuracy": max(wanted.count(label) for label in set(wanted)) / len(rows)}


def answered(found: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    return score_spans(found, [row.wanted for row in rows])


def translated(found: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    return score_texts(found, [row.wanted[0] for row in rows])


def perplexities(base: Path, folder: Path, rows: Sequence[Row]) -> tuple[float, float]:
    """Of the adapter and of the base alone, under PEFT: per token of the right translations, the end left out."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    with torch.inference_mode():
        adapted = _perplexity(model, tokenizer, rows)
        with model.disable_adapter():
            return adapted, _perplexity(model, tokenizer, rows)


def _perplexity(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    total, count = 0.0, 0
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        prompts = [tokenizer(PROMPT.format(text=row.text)).input_ids for row in part]
        targets = [tokenizer(row.wanted[0], add_special_tokens=False).input_ids for row in part]
        longest = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        labels = torch.full((len(part), longest), -100)
        mask = torch.zeros(len(part), longest, dtype=torch.long)
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            end = len(prompt) + len(target)
            ids[row, :end] = torch.tensor(prompt + target)
            labels[row, len(prompt) : end] = torch.tensor(target)
            mask[row, :end] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + int((labels != -100).sum())
    return math.exp(total / count)


def examples(rows: Sequence[Row], untuned: Sequence[str], tuned: Sequence[str]) -> list[dict[str, str]]:
    """The first rows as they come: none was picked."""
    return [
        {"given": row.text, "wanted": row.wanted[0], "untuned": before, "tuned": after}
        for row, before, after in list(zip(rows, untuned, tuned, strict=True))[:NUM_EXAMPLES]
    ]
