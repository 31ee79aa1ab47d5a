"""Vectors of texts: close for a text and its positive, apart for the others of a batch, or as close as a score says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.loss import CROSS_ENTROPY, TargetKind
from lora_runtime.train.metrics.embeddings import score_pairs, score_scored_pairs, score_triplets
from lora_runtime.train.rows.embed import EmbedRow, load_embed_rows
from lora_runtime.train.settings import DataFiles
from lora_runtime.train.task_base import TaskBase
from lora_runtime.train.tasks.api import Array, Batch, Encoded, Features, TaskShape, TrainTask, inputs_of, pad_rows
from lora_runtime.train.tasks.options import EmbedOptions
from lora_runtime.types import Pooling, Task


class EmbedTask(TrainTask):
    """See `TrainTask`.

    Pairs and triplets: a text's candidates are all positives and negatives of its batch; the loss is the cross-entropy
    of its own among their cosines over `temperature` (InfoNCE, van den Oord et al. 2018; the MultipleNegatives loss of
    sentence-transformers). Scored pairs: the squared error of the cosine.
    """

    kind = Task.EMBED
    base_does_it = True
    target_kind = TargetKind.CLASSES

    def __init__(self, options: EmbedOptions, data: DataFiles, seed: int, loss: str) -> None:
        if loss != CROSS_ENTROPY:
            raise InvalidRequest("loss", "is not chosen for embeddings: their rows decide it, pairs or scored pairs")
        self.rows = load_embed_rows(data.train, data.valid, options.schema, data.valid_share, seed)
        self.has_scores = self.rows.train[0].score is not None
        if self.has_scores:
            self.target_kind = TargetKind.VALUES
        super().__init__(loss)
        pairs = "triplet_accuracy" if self._num_texts == 3 else "retrieval_accuracy"
        self.selection = ("spearman" if self.has_scores else pairs, True)
        self._options = options
        self._max_length = data.max_length
        self._pooling = options.pooling or Pooling.MEAN
        self._ids: dict[str, int] = {}  # of positives, by their text

    @property
    def shape(self) -> TaskShape:
        return TaskShape(AutoModel, TaskType.FEATURE_EXTRACTION, ())

    @property
    def num_rows(self) -> tuple[int, int]:
        return len(self.rows.train), len(self.rows.valid)

    def encode(self, base: TaskBase) -> Encoded:
        if self._options.pooling is None and base.is_decoder:
            self._pooling = Pooling.LAST
        return Encoded(*(self._encode(side, base) for side in (self.rows.train, self.rows.valid)))

    def _encode(self, rows: Sequence[EmbedRow], base: TaskBase) -> Features:
        encoder = base.encoder
        features: list[dict[str, Any]] = []
        num_truncated = 0
        for row in rows:
            texts = [text for text in (row.text, row.positive, row.negative) if text is not None]
            try:
                sequences = encoder.encode([(t, None) for t in texts], max_length=self._max_length, truncate=True)
            except InvalidRequest as error:
                raise row.place.invalid(error.description) from error
            num_truncated += any(sequence.truncated for sequence in sequences)
            columns = [inputs_of(sequence.input_ids, sequence.token_type_ids) for sequence in sequences]
            label = self._ids.setdefault(row.positive, len(self._ids)) if row.score is None else row.score
            features.append({"texts": columns, "labels": label})
        return Features(features, num_truncated)

    def collate(self, base: TaskBase, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """All texts, then all positives, then all negatives; labels of [B] rows."""
        places = range(len(rows[0]["texts"]))
        batch = pad_rows(base, [row["texts"][place] for place in places for row in rows])
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def num_tokens(self, row: Mapping[str, Any]) -> int:
        return sum(len(columns["input_ids"]) for columns in row["texts"])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[k, B, d], k vectors a row: of the text, the positive and the negative."""
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"]
        if self._pooling is Pooling.CLS:
            pooled = hidden[:, 0]
        elif self._pooling is Pooling.LAST:
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        else:
            pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return pooled.view(self._num_texts, -1, pooled.shape[-1])

    @property
    def _num_texts(self) -> int:
        return 3 if self.rows.train[0].negative is not None else 2

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        vectors = functional.normalize(logits, dim=-1)
        if self.has_scores:
            return (vectors[0] * vectors[1]).sum(-1), labels.float()
        scores = vectors[0] @ vectors[1:].flatten(0, 1).T / self._options.temperature  # [B, (k - 1) B]
        own = torch.arange(len(labels), device=labels.device)
        again = (labels[:, None] == labels[None, :]) & (own[:, None] != own[None, :])  # the same positive: no negative
        scores[:, : len(labels)] = scores[:, : len(labels)].masked_fill(again, -torch.inf)
        return scores, own

    def predict(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, k, d]"""
        del labels
        return logits.transpose(0, 1).contiguous()

    def score(self, predictions: Array, labels: Array) -> dict[str, float]:
        first, second = predictions[:, 0], predictions[:, 1]
        if self.has_scores:
            return score_scored_pairs(first, second, labels)
        found = score_pairs(first, second, [row.positive for row in self.rows.valid])
        return found | (score_triplets(first, second, predictions[:, 2]) if self._num_texts == 3 else {})

    def metadata(self, base: TaskBase) -> dict[str, Any]:
        del base
        return {"pooling": self._pooling, "normalize": self._options.normalize}
