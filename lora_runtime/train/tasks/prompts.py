"""A text that goes on from a prompt: generation and translation. Only the completion and its end are learnt."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lora_runtime.errors import BaseModelUnsupported, InvalidRequest, TextTooLong, TrainingDataInvalid
from lora_runtime.model.template_process import TemplateProcess
from lora_runtime.model.text_generation import TextGeneration, decoder_facts
from lora_runtime.prompts.spec import PromptSpec
from lora_runtime.train.loss import TargetKind
from lora_runtime.train.metrics.texts import perplexity, score_texts
from lora_runtime.train.report.run import Example
from lora_runtime.train.rows.prompt import PromptRow, load_prompt_rows
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
from lora_runtime.train.tasks.options import PromptOptions
from lora_runtime.train.tasks.sampling import continue_prompts
from lora_runtime.types import Task

KEEP = "logits_to_keep"  # what most of transformers' decoders call it


class PromptsTask(TrainTask):
    """See `TrainTask`. Prompts are tokenised as serving does; the completion follows as the model would write it."""

    kind = Task.GENERATE
    target_kind = TargetKind.VOCABULARY
    selection = ("perplexity", False)
    base_does_it = True
    eval_rows_at_once = 1  # as many as in training: logits of a whole vocabulary are large

    def __init__(self, options: PromptOptions, data: DataFiles, seed: int, loss: str) -> None:
        super().__init__(loss)
        if options.is_translation and options.eval_samples and importlib.util.find_spec("sacrebleu") is None:
            message = "translations are scored by sacrebleu: pip install 'multilora[train]', or set it to 0"
            raise InvalidRequest("eval_samples", message)
        self.rows = load_prompt_rows(data.train, data.valid, options.schema, data.valid_share, seed)
        self._options = options
        self._data = data
        self._spec = PromptSpec(options.parsed, options.is_chat, options.system)
        self._keeps = False  # whether the model can leave out the logits of prompts

    @property
    def shape(self) -> TaskShape:
        return TaskShape(AutoModelForCausalLM, TaskType.CAUSAL_LM, (), needs_decoder=True)

    @property
    def num_rows(self) -> tuple[int, int]:
        return len(self.rows.train), len(self.rows.valid)

    def encode(self, base: TaskBase) -> Encoded:
        text = self._generation(base)
        self._keeps = KEEP in inspect.signature(base.model.forward).parameters
        end = base.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise BaseModelUnsupported("the base's tokenizer names no token that ends a text; set its eos_token")
        encoded = Encoded(*(self._encode(side, text, end) for side in (self.rows.train, self.rows.valid)))
        for path, features in ((self._data.train, encoded.train), (self._data.valid, encoded.valid)):
            if not features.rows:
                message = f"no prompt leaves room for a completion within {self._data.max_length} tokens"
                raise TrainingDataInvalid(path or self._data.train, None, f"{message}; raise the maximum length")
        return encoded

    def _generation(self, base: TaskBase) -> TextGeneration:
        facts = decoder_facts(base.model.config, base.model.generation_config, base.tokenizer)
        encoder = base.encoder
        text = TextGeneration(encoder, facts, base=encoder, renderer=TemplateProcess())
        if self._options.is_chat and not text.has_chat_template:
            raise InvalidRequest("chat", "the base's tokenizer has no chat template; leave it out, or choose another")
        return text

    def _encode(self, rows: Sequence[PromptRow], text: TextGeneration, end: int) -> Features:
        limit = min(self._data.max_length, text.max_length)
        features: list[dict[str, Any]] = []
        num_truncated = num_skipped = 0
        for row in rows:
            try:
                (prompt,) = text.encode_prompts([self._spec.prompt(row.fields, "row")], max_length=limit)
            except TextTooLong:
                num_skipped += 1
                continue
            except InvalidRequest as error:
                raise row.place.invalid(error.description) from error
            completion = [*self._completion(row, text), end]
            room = limit - prompt.num_tokens
            num_truncated += len(completion) > room
            own = completion[:room]
            labels = [IGNORED] * prompt.num_tokens + own
            features.append({**inputs_of([*prompt.input_ids, *own], None), "labels": labels})
        return Features(features, num_truncated, num_skipped)

    def _completion(self, row: PromptRow, text: TextGeneration) -> tuple[int, ...]:
        return text.encoder.encode_text("completion", row.completion, add_special_tokens=False).input_ids

    def collate(self, base: TaskBase, rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch = pad_rows(base, rows)
        if self._keeps:
            first = int((batch["labels"] != IGNORED).int().argmax(dim=1).min())
            batch[KEEP] = torch.tensor(batch["labels"].shape[1] - first + 1)
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, K, vocabulary] of the last K tokens: all from the one before the batch's first completion."""
        keep = batch.pop(KEEP, None)
        return model(**batch, **({} if keep is None else {KEEP: int(keep)})).logits

    def terms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        following = labels[:, -logits.shape[1] :][:, 1:]
        wanted = following != IGNORED
        return logits[:, :-1][wanted], following[wanted]

    def predict(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, 2]: the sum of the completion's -log p, and its tokens."""
        following = labels[:, -logits.shape[1] :][:, 1:]
        flat = logits[:, :-1].float().flatten(0, 1)
        losses = functional.cross_entropy(flat, following.flatten(), ignore_index=IGNORED, reduction="none")
        nll = losses.view(following.shape).sum(1, dtype=torch.float64)
        return torch.stack([nll, (following != IGNORED).sum(1).double()], dim=1)

    def score(self, predictions: Array, labels: Array) -> dict[str, float]:
        del labels
        nll, count = predictions.sum(0)
        return {"perplexity": perplexity(float(nll), int(count))}

    def sample(self, model: nn.Module, base: TaskBase) -> dict[str, float]:
        """BLEU and chrF of a translation's first validation rows, each continued greedily."""
        if not self._options.is_translation or not self._options.eval_samples:
            return {}
        found = self.samples(model, base, self._options.eval_samples)
        return score_texts([text for _, text in found], [row.completion for row, _ in found])

    def examples(self, base: TaskBase, predictions: Array, labels: Array) -> tuple[Example, ...]:
        del predictions, labels
        found = self.samples(base.model, base, NUM_EXAMPLES)
        return tuple(Example("\n".join(row.fields.values()), row.completion, text) for row, text in found)

    def samples(self, model: nn.Module, base: TaskBase, count: int) -> list[tuple[PromptRow, str]]:
        """The first `count` validation rows that fit, and what the model writes."""
        text = self._generation(base)
        prompts: list[tuple[int, ...]] = []
        rows: list[PromptRow] = []
        longest = 1
        for row in self.rows.valid:
            if len(prompts) == count:
                break
            try:
                (prompt,) = text.encode_prompts(
                    [self._spec.prompt(row.fields, "row")], max_length=self._data.max_length
                )
            except TextTooLong:
                continue
            prompts.append(prompt.input_ids)
            rows.append(row)
            longest = max(longest, len(self._completion(row, text)))
        return list(zip(rows, continue_prompts(model, text, base.pad_token_id, prompts, 2 * longest), strict=True))

    def metadata(self, base: TaskBase) -> dict[str, Any]:
        del base
        return {
            "prompt_template": self._options.template,
            "prompt_is_chat": self._options.is_chat,
            "system_prompt": self._options.system,
            "generation": dict(self._options.generation) or None,
        }
