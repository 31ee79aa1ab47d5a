"""The span of a context that answers a question, or none: windows over long contexts, as serving reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

from lora_runtime.answers.spans import best_spans, supports_no_answer
from lora_runtime.errors import InvalidRequest
from lora_runtime.model.encoder_text import Window
from lora_runtime.train.loss import TargetKind
from lora_runtime.train.metrics.spans import score_spans
from lora_runtime.train.report.run import Example
from lora_runtime.train.rows.answer import AnswerRow, load_answer_rows
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
    inputs_of,
    pad_rows,
)
from lora_runtime.train.tasks.options import AnswerOptions
from lora_runtime.types import SpanLogits, Task

MAX_WINDOWS = 4096  # of one context: training has no caller who waits

_NONE = "(no answer)"


class AnswerTask(TrainTask):
    """See `TrainTask`. A window without the answer has the place of "no answer" as its target."""

    kind = Task.ANSWER
    target_kind = TargetKind.POSITIONS
    selection = ("f1", True)

    def __init__(self, options: AnswerOptions, data: DataFiles, seed: int, loss: str) -> None:
        super().__init__(loss)
        self.rows = load_answer_rows(data.train, data.valid, options.schema, data.valid_share, seed)
        self._options = options
        self._max_length = data.max_length
        self._windows: list[tuple[Window, ...]] = []  # of the validation rows
        self._may_be_none = any(not row.answers for row in (*self.rows.train, *self.rows.valid))

    @property
    def shape(self) -> TaskShape:
        return TaskShape(AutoModelForQuestionAnswering, TaskType.QUESTION_ANS, ("qa_outputs",))

    @property
    def num_rows(self) -> tuple[int, int]:
        return len(self.rows.train), len(self.rows.valid)

    def encode(self, base: TaskBase) -> Encoded:
        train, _ = self._encode(self.rows.train, base)
        valid, self._windows = self._encode(self.rows.valid, base)
        if self._may_be_none and not all(map(supports_no_answer, self._windows)):
            message = "the base's tokenizer adds no token at which no answer can be scored; leave such questions out"
            raise next(row for row in (*self.rows.train, *self.rows.valid) if not row.answers).place.invalid(message)
        return Encoded(train, valid)

    def _encode(self, rows: Sequence[AnswerRow], base: TaskBase) -> tuple[Features, list[tuple[Window, ...]]]:
        encoder = base.encoder
        features: list[dict[str, Any]] = []
        cut: list[tuple[Window, ...]] = []
        for row in rows:
            try:
                (windows,) = encoder.encode_questions(
                    [(row.question, row.context)],
                    max_length=self._max_length,
                    doc_stride=self._options.doc_stride,
                    max_windows=MAX_WINDOWS,
                )
            except InvalidRequest as error:
                raise row.place.invalid(f"{error.field.rpartition('.')[2]} {error.description}") from error
            cut.append(windows)
            features += [_feature(window, row) for window in windows]
        return Features(features, sum(len(windows) > 1 for windows in cut)), cut

    def collate(self, base: TaskBase, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return pad_rows(base, rows)  # labels are tuples, which are not padded

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, 2, T]: of starts and of ends, padding at -inf, so that no loss depends on it."""
        outputs = model(**batch)
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
        return logits.masked_fill(batch["attention_mask"][:, None, :] == 0, -torch.inf)

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted = labels != IGNORED
        return logits[wanted], labels[wanted]

    def predict(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, T, 2]: batches of other lengths are padded along the second axis alone."""
        del labels
        return logits.transpose(1, 2)

    def score(self, predictions: Array, labels: Array) -> dict[str, float]:
        del labels
        wanted = [[text for _, text in row.answers] for row in self.rows.valid]
        return score_spans(self.answers(predictions), wanted)

    def examples(self, base: TaskBase, predictions: Array, labels: Array) -> tuple[Example, ...]:
        del base, labels
        rows = islice(zip(self.rows.valid, self.answers(predictions), strict=True), NUM_EXAMPLES)
        return tuple(
            Example(row.question, row.answers[0][1] if row.answers else _NONE, found or _NONE) for row, found in rows
        )

    def answers(self, predictions: Array) -> list[str]:
        """The best answer of each validation row, "" for none, by the rules of serving."""
        rows = iter(predictions)
        texts: list[str] = []
        for row, windows in zip(self.rows.valid, self._windows, strict=True):
            logits = [
                SpanLogits(*both[: len(window.offsets)].T.tolist())
                for window, both in zip(windows, islice(rows, len(windows)), strict=True)
            ]
            spans = best_spans(
                windows,
                logits,
                top_k=1,
                max_answer_tokens=self._options.max_answer_tokens,
                allow_no_answer=self._may_be_none,
            )
            texts.append(row.context[spans[0].start : spans[0].end] if spans else "")
        return texts


def _feature(window: Window, row: AnswerRow) -> dict[str, Any]:
    sequence = window.sequence
    return {**inputs_of(sequence.input_ids, sequence.token_type_ids), "labels": target_of(window, row.answers)}


def target_of(window: Window, answers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """First and last token of the first answer that lies in the window, else the place of "no answer".

    -100 twice where the tokenizer has no such place: the window teaches nothing.
    """
    places = [(k, *place) for k, place in enumerate(window.offsets) if place is not None and place[0] < place[1]]
    for start, text in answers:
        end = start + len(text)
        inside = [k for k, begin, stop in places if begin < end and stop > start]
        if inside and places[0][1] <= start and end <= places[-1][2]:
            return inside[0], inside[-1]
    null = IGNORED if window.null_index is None else window.null_index
    return null, null
