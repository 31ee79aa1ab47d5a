"""PEFT as the oracle: making adapters, and what one of them answers alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

from lora_runtime.types import TokenSequence

ALL_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
TASK_CLASSES: Mapping[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
    "CAUSAL_LM": AutoModelForCausalLM,
}

_HEAD = re.compile(r"\.(classifier|score|qa_outputs)\.")

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


def make_task_adapter(
    base: Path, folder: Path, task_type: str, config: Mapping[str, Any], *, num_labels: int | None = None,
    seed: int = 0, vocab_size: int | None = None, name: str = "default",
) -> Path:  # fmt: skip
    """Save a PEFT adapter of any task, every parameter that training could change moved away from its initial value.

    `vocab_size` resizes the base's vocabulary first. An adapter with a `name` lies in a sub-folder of that name.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of most of what is tested here
        model = _task_model(base, task_type, num_labels, vocab_size)
        adapted = get_peft_model(model, LoraConfig(task_type=task_type, **config), adapter_name=name)
        train(adapted)
        adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def train(adapted: torch.nn.Module) -> None:
    """Move every trainable parameter as far as a visible training would."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn_like(parameter)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * noise.clamp(-2, 2))
            else:
                parameter.add_((0.5 if _HEAD.search(name) else 0.15) * noise)


def _task_model(base: Path, task_type: str, num_labels: int | None, vocab_size: int | None) -> PreTrainedModel:
    options = {} if num_labels is None else {"num_labels": num_labels}
    model, info = TASK_CLASSES[task_type].from_pretrained(str(base), output_loading_info=True, **options)
    prefix = f"{model.base_model_prefix}."
    if any(key.startswith(prefix) and ".pooler." not in key for key in info["missing_keys"]):
        # Llama's class for answers calls the backbone "transformer", and finds no weights under the name "model"
        model.get_submodule(model.base_model_prefix).load_state_dict(AutoModel.from_pretrained(str(base)).state_dict())
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model.eval()


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


class TaskOracle:
    """One adapter of any task under PEFT on a fresh base, fp32; `folder` None is the base alone.

    `last_token` pools an embedding as a decoder's: from its last token.
    """

    def __init__(
        self, base: Path, folder: Path | None, task_type: str, *, num_labels: int | None = None,
        vocab_size: int | None = None, last_token: bool = False,
    ) -> None:  # fmt: skip
        self.model: torch.nn.Module = _task_model(base, task_type, num_labels, vocab_size)
        self._task_type = task_type
        self._last_token = last_token
        self._takes_types = getattr(self.model.config, "type_vocab_size", 0) > 1
        if folder is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = PeftModel.from_pretrained(self.model, str(folder)).eval()

    def answer(self, sequence: TokenSequence) -> torch.Tensor:
        """One text alone, without padding, in the shape in which the runner answers its task:

        [C] of a sequence; [n, C] of tokens; [n, 2] of spans; [d] of an embedding, the mean over an encoder's tokens
        or a decoder's last; [vocabulary] of the next token.
        """
        output = self._forward(sequence)
        match self._task_type:
            case "QUESTION_ANS":
                return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
            case "FEATURE_EXTRACTION":
                hidden = output.last_hidden_state[0]
                return hidden[-1] if self._last_token else hidden.mean(0)
            case "CAUSAL_LM":
                return output.logits[0, -1]
            case _:
                return output.logits[0]

    def hidden_states(self, sequence: TokenSequence) -> torch.Tensor:
        """[n, d] of one text alone, from an oracle of FEATURE_EXTRACTION."""
        return self._forward(sequence).last_hidden_state[0]

    def _forward(self, sequence: TokenSequence) -> Any:
        inputs = {"input_ids": torch.tensor([sequence.input_ids])}
        if sequence.token_type_ids is not None and self._takes_types:
            inputs["token_type_ids"] = torch.tensor([sequence.token_type_ids])
        with torch.inference_mode():
            return self.model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))


def relative_difference(found: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The norm of all differences over the norm of all that was wanted."""
    ours, theirs = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (found, want))
    return float((ours - theirs).norm() / theirs.norm())
