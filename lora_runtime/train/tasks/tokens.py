"""A tag for each word, learnt at the word's first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.loss import ClassCounts, TargetKind
from lora_runtime.train.metrics.classes import LabelScore
from lora_runtime.train.metrics.tags import entity_scores, score_tags
from lora_runtime.train.report.run import Example
from lora_runtime.train.rows.tokens import TokensRow, load_tokens_rows
from lora_runtime.train.settings import DataFiles
from lora_runtime.train.task_base import TaskBase
from lora_runtime.train.tasks.api import (
    IGNORED,
    NUM_EXAMPLES,
    Array,
    Batch,
    Encoded,
    Features,
    TaskShape,
    TrainTask,
    counts_of,
    inputs_of,
    pad_rows,
)
from lora_runtime.train.tasks.options import TokensOptions
from lora_runtime.types import Task


class TokensTask(TrainTask):
    """See `TrainTask`. A sentence is its words joined by spaces, tokenised as serving tokenises a text."""

    kind = Task.CLASSIFY_TOKENS
    target_kind = TargetKind.CLASSES
    selection = ("f1", True)

    def __init__(self, options: TokensOptions, data: DataFiles, seed: int, loss: str) -> None:
        super().__init__(loss)
        self.rows = load_tokens_rows(data.train, data.valid, options.schema, data.valid_share, seed)
        self.labels = self.rows.labels
        self._max_length = data.max_length
        self._counts: ClassCounts | None = None

    @property
    def shape(self) -> TaskShape:
        options = {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: index for index, name in enumerate(self.labels)},
        }
        return TaskShape(AutoModelForTokenClassification, TaskType.TOKEN_CLS, ("classifier", "score"), options)

    @property
    def num_rows(self) -> tuple[int, int]:
        return len(self.rows.train), len(self.rows.valid)

    def encode(self, base: TaskBase) -> Encoded:
        encoded = Encoded(*(self._encode(side, base) for side in (self.rows.train, self.rows.valid)))
        labels = [label for row in encoded.train.rows for label in row["labels"]]
        self._counts = counts_of(np.array(labels), len(self.labels))
        return encoded

    def _encode(self, rows: Sequence[TokensRow], base: TaskBase) -> Features:
        index = {name: place for place, name in enumerate(self.labels)}
        encoder = base.encoder
        features: list[dict[str, Any]] = []
        num_truncated = 0
        for row in rows:
            try:
                (text,) = encoder.encode_tokens([" ".join(row.words)], max_length=self._max_length, truncate=True)
            except InvalidRequest as error:
                raise row.place.invalid(error.description) from error
            firsts = first_tokens(row.words, text.offsets)
            labels = [IGNORED] * len(text.offsets)
            for tag, first in zip(row.tags, firsts, strict=True):
                if first is not None:
                    labels[first] = index[tag]
            num_truncated += text.sequence.truncated
            sequence = text.sequence
            features.append({**inputs_of(sequence.input_ids, sequence.token_type_ids), "labels": labels})
        return Features(features, num_truncated)

    def collate(self, base: TaskBase, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return pad_rows(base, rows)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, T, num_labels]"""
        return model(**batch).logits

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted = labels != IGNORED
        return logits[wanted], labels[wanted]

    def predict(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, T] of label indices."""
        del labels
        return logits.argmax(-1)

    def score(self, predictions: Array, labels: Array) -> dict[str, float]:
        truth, found = self.tags(predictions, labels)
        return score_tags(found, truth, self.labels)

    def tags(self, predictions: Array, labels: Array) -> tuple[list[list[str]], list[list[str]]]:
        """Tags of the words that were not cut off: the true ones and those predicted."""
        truth = [[self.labels[place] for place in row[row != IGNORED]] for row in labels]
        found = [
            [self.labels[place] for place in row[: len(wanted)][wanted != IGNORED]]
            for row, wanted in zip(predictions, labels, strict=True)
        ]
        return truth, found

    def label_scores(self, predictions: Array, labels: Array) -> tuple[LabelScore, ...]:
        truth, found = self.tags(predictions, labels)
        return entity_scores(found, truth, self.labels)

    def examples(self, base: TaskBase, predictions: Array, labels: Array) -> tuple[Example, ...]:
        del base
        truth, found = self.tags(predictions[:NUM_EXAMPLES], labels[:NUM_EXAMPLES])
        rows = zip(self.rows.valid, truth, found, strict=False)
        return tuple(Example(" ".join(row.words), " ".join(wanted), " ".join(tags)) for row, wanted, tags in rows)

    def class_counts(self) -> ClassCounts | None:
        return self._counts

    def metadata(self, base: TaskBase) -> dict[str, Any]:
        del base
        return {"labels": self.labels}


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int] | None]) -> list[int | None]:
    """Of words joined by single spaces, the first token of each; None where it has none (or they were cut off).

    A token that reaches over two words belongs to the first of them.
    """
    places = [(k, *place) for k, place in enumerate(offsets) if place is not None and place[0] < place[1]]
    firsts: list[int | None] = []
    start, at = 0, 0
    for word in words:
        while at < len(places) and places[at][1] < start:
            at += 1
        inside = at < len(places) and places[at][1] < start + len(word)
        firsts.append(places[at][0] if inside else None)
        start += len(word) + 1
    return firsts
