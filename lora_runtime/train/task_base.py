"""A base under the head of a task: loaded, checked, fingerprinted; nothing is wrapped yet."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from lora_runtime.adapters.fingerprint import fingerprint_base
from lora_runtime.adapters.metadata import BaseFingerprint
from lora_runtime.errors import BaseModelUnsupported, InvalidRequest, first_line
from lora_runtime.model.checkpoint import Source, resolve_source
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.model.gguf_file import SUFFIX as GGUF_SUFFIX
from lora_runtime.model.skeleton import is_decoder
from lora_runtime.train.gguf_base import load_gguf_base
from lora_runtime.train.quantized import quantisation_of
from lora_runtime.train.settings import BaseBits, Precision, TrainSettings

if TYPE_CHECKING:
    from lora_runtime.train.tasks.api import TaskShape

_UNREADABLE = (OSError, ValueError, KeyError, ImportError)


@dataclass(frozen=True, slots=True)
class TaskBase:
    """A base under a head, its frozen weights as the run wants them."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    fingerprint: BaseFingerprint  # of the backbone in the dtype of its checkpoint
    trained_whole: tuple[str, ...]  # modules that the checkpoint lacks: the head, and a pooler if there is none
    max_length: int  # tokens that the run allows
    is_decoder: bool

    @property
    def pad_token_id(self) -> int:
        return cast(int, self.tokenizer.pad_token_id)

    @property
    def encoder(self) -> TextEncoder:
        """The tokenizer as serving uses it; raises BaseModelUnsupported for one that serving would refuse."""
        if not self.tokenizer.is_fast:
            raise BaseModelUnsupported("the base has no fast tokenizer (tokenizer.json), which this task needs")
        return TextEncoder(self.tokenizer, self.max_length)


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No load report and no progress bars: what they say of a fresh head is expected here.

    Of Python's warnings only those of libraries about their own insides are hidden.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks for a property that transformers 5 has renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_task_base(settings: TrainSettings, shape: TaskShape, device: torch.device) -> TaskBase:
    """Load `settings.base` with a head drawn from torch's generator where it has none.

    Raises BaseModelUnsupported when the base cannot be loaded, lacks weights of its own, or is an encoder-decoder,
    whose adapters do not carry their head; InvalidRequest where the length or the precision cannot be had.
    """
    source = _check_place(settings.base)
    if source.gguf_file is not None:
        if settings.optim.quantize is not BaseBits.NONE:
            raise InvalidRequest("quantize", "a GGUF file's weights are rounded already; leave it out")
        model, missing, tokenizer = load_gguf_base(source, shape)
        _prepare_tokenizer(tokenizer, settings.base)
    else:
        model, missing = _load_model(settings.base, shape, {"dtype": "auto"})
        tokenizer = _load_tokenizer(settings.base)
    if model.config.is_encoder_decoder:
        raise BaseModelUnsupported(f"base {settings.base!r} is an encoder-decoder, which is not served yet")
    decoder = is_decoder(model.config)
    if shape.needs_decoder and not decoder:
        message = "is an encoder, which generates no text; choose a decoder"
        raise BaseModelUnsupported(f"base {settings.base!r} {message}")
    trained_whole = _modules_to_train(model, missing, shape, settings.base)
    fingerprint = fingerprint_base(model.base_model, model.config)
    if settings.optim.quantize is not BaseBits.NONE:
        del model  # it was there for its fingerprint
        options = quantisation_of(settings.optim, trained_whole, device)
        model, _ = _load_model(settings.base, shape, options)
    elif settings.optim.precision is Precision.BF16:
        model.bfloat16()
    else:
        model.float()
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False  # keys and values are for texts that go on
    if settings.optim.gradient_checkpointing:
        _checkpoint_gradients(model)
    limit = _length_limit(model, tokenizer)
    return TaskBase(model, tokenizer, fingerprint, trained_whole, limit, decoder)


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise InvalidRequest("gradient_checkpointing", f"is not offered by {type(model).__name__}; leave it out")
    # transformers 5.24 gave it another name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _check_place(base: str) -> Source:
    path = Path(base)
    local = path.is_dir()
    if local and (path / "adapter_config.json").exists():
        raise BaseModelUnsupported(f"base {base!r} holds an adapter; name the model that it was trained on")
    if not local and path.suffix.lower() != GGUF_SUFFIX and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise BaseModelUnsupported(f"base {base!r} is not a folder")
    return resolve_source(base)


def _load_model(base: str, shape: TaskShape, options: dict[str, Any]) -> tuple[PreTrainedModel, set[str]]:
    try:
        loaded = shape.auto_class.from_pretrained(
            base,
            local_files_only=Path(base).is_dir(),
            ignore_mismatched_sizes=True,  # a head of another size is replaced, anything else refused below
            output_loading_info=True,
            **shape.options,
            **options,
        )
    except _UNREADABLE as error:
        raise BaseModelUnsupported(f"base {base!r} cannot be loaded: {first_line(error)}") from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _load_tokenizer(base: str) -> Tokenizer:
    try:
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(base, local_files_only=Path(base).is_dir()))
    except _UNREADABLE as error:
        raise BaseModelUnsupported(f"base {base!r} has no usable tokenizer: {first_line(error)}") from error
    _prepare_tokenizer(tokenizer, base)
    return tokenizer


def _prepare_tokenizer(tokenizer: Tokenizer, base: str) -> None:
    """Padding on the right, with the end token where there is none for it."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BaseModelUnsupported(f"base {base!r} has no token to pad with; set pad_token in its tokenizer")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"


def _modules_to_train(model: PreTrainedModel, missing: set[str], shape: TaskShape, base: str) -> tuple[str, ...]:
    """Modules with fresh parameters, which the adapter has to carry, and the heads that PEFT always saves."""
    inside = model.base_model is model  # no head at all
    backbone = "" if inside else f"{model.base_model_prefix}."
    fresh = {name for name in shape.heads if hasattr(model, name)}
    for key in sorted(missing):
        if not inside and not key.startswith(backbone):
            fresh.add(key.split(".", 1)[0])
        elif not key.startswith(f"{backbone}pooler."):
            raise BaseModelUnsupported(f"base {base!r} lacks the weight {key}, or has it in another shape")
        elif not inside:  # embeddings pool without it
            fresh.add(f"{backbone}pooler")
    if fresh and not shape.heads:
        name = min(fresh)
        raise BaseModelUnsupported(f"base {base!r} has no trained {name}, so it does not do this task to begin with")
    return tuple(sorted(fresh))


def _length_limit(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    limits = [int(tokenizer.model_max_length)]
    if positions := getattr(model.config, "max_position_embeddings", None):
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        padding_idx = getattr(table, "padding_idx", None)  # RoBERTa counts positions from padding_idx + 1
        limits.append(int(positions) if padding_idx is None else int(positions) - padding_idx - 1)
    return min(limits)
