"""What PEFT answers, one adapter and one text at a time, and the comparison of every timed answer with it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from server.bench.adapters.folders import name_of
from server.bench.adapters.plan import NUM_LABELS, RANK, TARGETS, TOLERANCE
from server.bench.measure import OutputsDiffer
from server.pb.multilora.v1 import inference_pb2

_DISTINCT = 10 * TOLERANCE  # at least, between two adapters' logits of a text; else a mix-up would pass


@dataclass(frozen=True, slots=True)
class Question:
    """One call: an adapter as it is named, and what must be the answer."""

    adapter: str
    file: int
    text: int

    @classmethod
    def of(cls, number: int, num_files: int, text: int) -> Question:
        return cls(name_of(number), number % num_files, text)


class Reference:
    """Logits [file of weights, text, label] of sequence classifiers."""

    def __init__(self, texts: tuple[str, ...], logits: np.ndarray) -> None:
        self.texts = texts
        self.logits = logits
        self.largest_error = 0.0
        self.num_checked = 0
        if not (nearest := _nearest(logits)) >= _DISTINCT:
            raise OutputsDiffer(f"two adapters' references differ by {nearest:.1e} alone: a mix-up would not be seen")

    @classmethod
    def compute(cls, base: str, files: tuple[Path, ...], texts: tuple[str, ...]) -> Reference:
        """Ask PEFT; the files are loaded one after the other into one model."""
        tokenizer = AutoTokenizer.from_pretrained(base)
        encoded = [tokenizer(text, return_tensors="pt") for text in texts]
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=NUM_LABELS)
        config = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS))
        adapted = get_peft_model(model, config).eval()
        logits = np.empty((len(files), len(texts), NUM_LABELS), np.float32)
        with torch.inference_mode():
            for row, file in enumerate(files):
                set_peft_model_state_dict(adapted, load_file(file))
                for column, inputs in enumerate(encoded):
                    logits[row, column] = adapted(**inputs).logits[0].numpy()
        return cls(texts, logits)

    def request(self, question: Question) -> inference_pb2.ClassifyRequest:
        inputs = [inference_pb2.TextInput(text=self.texts[question.text])]
        return inference_pb2.ClassifyRequest(adapter=question.adapter, inputs=inputs, return_logits=True)

    def check(self, question: Question, reply: inference_pb2.ClassifyResponse) -> None:
        """Raises OutputsDiffer: no figure is worth having then."""
        error = self.error(question.file, question.text, reply)
        self.num_checked += 1
        self.largest_error = max(self.largest_error, error)
        if not error <= TOLERANCE:
            message = f"{question.adapter} answered text {question.text} with an error of {error:.1e}"
            raise OutputsDiffer(f"{message} (limit {TOLERANCE}); nothing is reported")

    def error(self, file: int, text: int, reply: inference_pb2.ClassifyResponse) -> float:
        found = np.asarray(reply.results[0].logits, np.float32)
        if found.shape != (NUM_LABELS,):
            return float("inf")
        return float(np.abs(found - self.logits[file, text]).max())


def _nearest(logits: np.ndarray) -> float:
    """The least difference between any two adapters' logits of one text."""
    pairs = itertools.combinations(range(len(logits)), 2)
    return min((float(np.abs(logits[i] - logits[j]).max(-1).min()) for i, j in pairs), default=float("inf"))
