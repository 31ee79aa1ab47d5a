"""A base with a fresh classification head: loaded, checked, fingerprinted, and wrapped by PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from lora_runtime.adapters.fingerprint import fingerprint_base
from lora_runtime.adapters.metadata import BaseFingerprint
from lora_runtime.errors import BaseModelUnsupported, InvalidRequest
from lora_runtime.train.settings import TrainSettings

PEFT_HEADS = ("classifier", "score")  # PEFT saves these of a sequence classifier without being told


@dataclass(frozen=True, slots=True)
class TaskModel:
    """A base, in fp32, under a head for the labels of a run; nothing is wrapped yet."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    fingerprint: BaseFingerprint  # of the backbone in the dtype of its checkpoint
    trained_whole: tuple[str, ...]  # modules that the checkpoint lacks: the head, and a pooler if there is none
    max_length: int  # tokens that the base allows

    @property
    def pad_token_id(self) -> int:
        return cast(int, self.tokenizer.pad_token_id)


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No load report and no progress bars: what they say of a fresh head is expected here.

    Of Python's warnings only one is hidden: PEFT 0.21 asks for a property that transformers 5 has renamed.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_task_model(settings: TrainSettings, labels: Sequence[str]) -> TaskModel:
    """Load `settings.base` with a head of one row for each label, drawn from torch's generator.

    Raises BaseModelUnsupported when the base cannot be loaded, lacks weights of its own, or is an
    encoder-decoder, whose adapters do not carry their head.
    """
    model, missing = _load_model(settings, labels)
    if model.config.is_encoder_decoder:
        raise BaseModelUnsupported(f"base {settings.base!r} is an encoder-decoder; a classifier needs an encoder")
    trained_whole = _modules_to_train(model, missing, settings.base)
    fingerprint = fingerprint_base(model.base_model, model.config)
    tokenizer = _load_tokenizer(settings.base)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.float()
    return TaskModel(model, tokenizer, fingerprint, trained_whole, _length_limit(model, tokenizer))


def _load_model(settings: TrainSettings, labels: Sequence[str]) -> tuple[PreTrainedModel, set[str]]:
    base = settings.base
    local = Path(base).is_dir()
    if local and (Path(base) / "adapter_config.json").exists():
        raise BaseModelUnsupported(f"base {base!r} holds an adapter; name the model that it was trained on")
    if not local and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise BaseModelUnsupported(f"base {base!r} is not a folder")
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            base,
            id2label=dict(enumerate(labels)),
            label2id={name: index for index, name in enumerate(labels)},
            problem_type=settings.schema.problem_type.value,
            dtype="auto",
            local_files_only=local,
            ignore_mismatched_sizes=True,  # a head of another size is replaced, anything else refused below
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelUnsupported(f"base {base!r} cannot be loaded: {_first_line(error)}") from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _load_tokenizer(base: str) -> Tokenizer:
    try:
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(base, local_files_only=Path(base).is_dir()))
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelUnsupported(f"base {base!r} has no usable tokenizer: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BaseModelUnsupported(f"base {base!r} has no token to pad with; set pad_token in its tokenizer")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _modules_to_train(model: PreTrainedModel, missing: set[str], base: str) -> tuple[str, ...]:
    """Modules with fresh parameters, which the adapter has to carry, and the heads that PEFT always saves."""
    backbone = f"{model.base_model_prefix}."
    fresh = {name for name in PEFT_HEADS if hasattr(model, name)}
    for key in sorted(missing):
        if not key.startswith(backbone):
            fresh.add(key.split(".", 1)[0])
        elif key.startswith(f"{backbone}pooler."):
            fresh.add(f"{backbone}pooler")
        else:
            raise BaseModelUnsupported(f"base {base!r} lacks the weight {key}, or has it in another shape")
    return tuple(sorted(fresh))


def _length_limit(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    limits = [int(tokenizer.model_max_length)]
    if positions := getattr(model.config, "max_position_embeddings", None):
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        padding_idx = getattr(table, "padding_idx", None)  # RoBERTa counts positions from padding_idx + 1
        limits.append(int(positions) if padding_idx is None else int(positions) - padding_idx - 1)
    return min(limits)


def add_lora(task_model: TaskModel, settings: TrainSettings) -> tuple[PeftModel, tuple[str, ...]]:
    """Wrap the targets; returns the model and the target names as they stand in adapter_config.json."""
    model = task_model.model
    targets = settings.target_modules or encoder_linears(model)
    transposed = _check_targets(model, targets, task_model.trained_whole)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.rank,
        lora_alpha=cast(int, settings.lora_alpha),  # PEFT declares an int, and takes any number
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        modules_to_save=[name for name in task_model.trained_whole if name not in PEFT_HEADS] or None,
        fan_in_fan_out=transposed,
    )
    return cast(PeftModel, get_peft_model(model, config)), targets


def encoder_linears(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths, inside one layer, of every attention and MLP linear of the backbone's layers.

    A layer is an entry of a module list, so its path has a number; poolers and heads have none.
    """
    tails: set[str] = set()
    for name, module in model.base_model.named_modules():
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if numbers and isinstance(module, (nn.Linear, Conv1D)):
            tails.add(".".join(parts[numbers[-1] + 1 :]))
    if not tails - {""}:
        raise BaseModelUnsupported(f"{type(model).__name__} has no linear layers to adapt; name target modules")
    return tuple(sorted(tails - {""}))


def _check_targets(model: PreTrainedModel, targets: Sequence[str], trained_whole: Sequence[str]) -> bool:
    """Whether the targets are Conv1D; raises InvalidRequest for one that matches nothing, or the head."""
    kinds: set[bool] = set()
    for target in targets:
        matched = {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")}
        if not matched:
            raise InvalidRequest("target_modules", f"{target!r} matches no module of {type(model).__name__}")
        for name, module in matched.items():
            if not isinstance(module, (nn.Linear, Conv1D)):
                raise InvalidRequest("target_modules", f"{target!r} matches {name}, which is not a linear layer")
            if any(f"{name}.".startswith(f"{whole}.") for whole in trained_whole):
                raise InvalidRequest(
                    "target_modules",
                    f"{target!r} matches {name}, which is trained in full; write a longer path",
                )
            kinds.add(isinstance(module, Conv1D))
    if len(kinds) > 1:
        raise InvalidRequest("target_modules", "name Conv1D and Linear layers together; choose one kind")
    return kinds == {True}


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy, on the host, of the parameters that are trained."""
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters() if value.requires_grad}
