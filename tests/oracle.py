"""PEFT as the oracle: making adapters, and what one of them answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

ALL_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]

logging.set_verbosity_error()
logging.disable_progress_bar()


def make_adapter(
    base: Path, folder: Path, *, rank: int = 4, targets: Sequence[str] | str = ("query", "value"), num_labels: int = 3,
    seed: int = 0, **config: Any,
) -> Path:  # fmt: skip
    """Save a random, untrained PEFT sequence classifier whose deltas are large enough to be seen."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=num_labels)
    given = targets if isinstance(targets, str) else list(targets)
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": given} | config
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


class PeftOracle:
    """One adapter under PEFT on a base of its own, fp32."""

    def __init__(self, base: Path, folder: Path, num_labels: int) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=num_labels)
        self._model = PeftModel.from_pretrained(model, str(folder)).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(str(base))

    def logits(self, text: str, pair: str | None = None) -> torch.Tensor:
        """[num_labels] of one text alone: no padding."""
        with torch.inference_mode():
            return self._model(**self._tokenizer(text, pair, return_tensors="pt")).logits[0]
