"""Reading a base: where it is, its task class in memory, and its tokenizer."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.errors import BaseModelUnsupported, first_line
from lora_runtime.heads.task_head import PROBE_LABELS
from lora_runtime.model import gguf_file as gguf
from lora_runtime.model.skeleton import is_decoder

_MODEL_CONFIG = "config.json"
_UNREADABLE = (OSError, ValueError, KeyError, ImportError)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a base is read from."""

    name: str  # what the base is called in answers and messages
    place: str  # a folder, or a name on the hub
    gguf_file: str | None = None  # of that place


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base as transformers loads it."""

    model: Any  # a decoder with its output layer; an encoder with its classifier, for the pooler and the like
    missing: frozenset[str]  # parameters that the checkpoint lacks
    tokenizer: PreTrainedTokenizerBase


def resolve_source(name_or_path: str | Path, gguf_file: str | None = None) -> Source:
    """Find a base by hub name, by folder, or by the path of a GGUF file; raises BaseModelUnsupported.

    A folder without config.json that holds one GGUF file is that file.
    """
    path = Path(name_or_path)
    if path.suffix.lower() == gguf.SUFFIX and not path.is_dir():
        return _gguf_source(path, gguf_file)
    if str(name_or_path).startswith(("/", ".", "~")) and not path.is_dir():
        raise BaseModelUnsupported(f"base {name_or_path}: is not a folder", base=str(name_or_path))
    if not path.is_dir():
        return Source(f"{path}/{gguf_file}" if gguf_file else str(name_or_path), str(name_or_path), gguf_file)
    name = path.resolve().name
    if (path / CONFIG_FILE).exists():
        raise BaseModelUnsupported(
            f"base {name}: the folder holds an adapter; give the base it was trained on", base=name
        )
    if gguf_file is None and not (path / _MODEL_CONFIG).exists():
        gguf_file = _only_gguf(path)
    if gguf_file is None:
        return Source(name, str(name_or_path))
    return _gguf_source(path / gguf_file, None)


def _gguf_source(path: Path, gguf_file: str | None) -> Source:
    if not path.is_file():
        raise BaseModelUnsupported(
            f"base {path}: there is no such file; a GGUF file on the hub is named by its repository and --gguf-file",
            base=str(path),
        )
    if gguf_file not in (None, path.name):
        raise BaseModelUnsupported(
            f"base {path}: is a GGUF file itself, and --gguf-file names another, {gguf_file}; name one of them",
            base=str(path),
        )
    return Source(path.name, str(path.parent), path.name)


def _only_gguf(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == gguf.SUFFIX)
    if len(names) > 1:
        raise BaseModelUnsupported(
            f"base {folder.name}: the folder holds {len(names)} GGUF files ({', '.join(names[:3])}); name one by its "
            "path or by --gguf-file",
            base=folder.name,
        )
    return names[0] if names else None


def read_checkpoint(source: Source) -> Checkpoint:
    """Load a base in the dtype of its checkpoint, a GGUF file in fp32; raises BaseModelUnsupported."""
    name = source.name
    try:
        with _quiet():
            if source.gguf_file is not None:
                model, info, tokenizer = gguf.load_gguf(source.place, source.gguf_file, name)
            else:
                model, info = _load_class(source.place, name)
                tokenizer = AutoTokenizer.from_pretrained(source.place)
    except _UNREADABLE as error:
        raise BaseModelUnsupported(f"base {name}: cannot be loaded ({first_line(error)})", base=name) from error
    missing = {str(key) for key in info["missing_keys"]} | {str(entry[0]) for entry in info["mismatched_keys"]}
    lacking = sorted(key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key)
    if lacking:
        raise BaseModelUnsupported(
            f"base {name}: its checkpoint lacks {lacking[0]} and {len(lacking) - 1} more", base=name
        )
    if not getattr(tokenizer, "is_fast", False):
        raise BaseModelUnsupported(f"base {name}: has no fast tokenizer (tokenizer.json)", base=name)
    return Checkpoint(model, frozenset(missing), tokenizer)


def _load_class(place: str, name: str) -> tuple[Any, dict[str, Any]]:
    config = AutoConfig.from_pretrained(place)
    if config.is_encoder_decoder:
        raise BaseModelUnsupported(f"base {name}: is an encoder-decoder, which is not served yet", base=name)
    if is_decoder(config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=PROBE_LABELS, ignore_mismatched_sizes=True, output_loading_info=True
        )
    return loaded


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' progress bars and load reports: a missing classifier is what we expect."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
