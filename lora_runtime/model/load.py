"""Loading a base: sites and heads found by observation, the packed forward proved before anything is served."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.fingerprint import fingerprint_base
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.heads import TaskHead
from lora_runtime.heads.task_head import PROBE_LABELS
from lora_runtime.model.base import BaseModel
from lora_runtime.model.inject import Calls, make_sites, observe_calls, wrap_sites
from lora_runtime.model.probe import SeparateOutputs, prove_head, prove_packed, separate_outputs
from lora_runtime.types import Task


def load_base(name_or_path: str | Path) -> BaseModel:
    """Load an encoder by hub name or folder, in fp32 on the CPU.

    Raises BaseModelUnsupported when it cannot be loaded or when its packed forward is not exact.
    """
    name = Path(name_or_path).resolve().name if Path(name_or_path).exists() else str(name_or_path)
    model, missing, tokenizer = _from_pretrained(name_or_path, name)
    prefix: str = model.base_model_prefix
    backbone: nn.Module = getattr(model, prefix)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise BaseModelUnsupported(f"base {name}: its forward takes no position_ids, which packing needs", base=name)
    fingerprint = fingerprint_base(backbone, model.config)
    model.float().eval().requires_grad_(False)
    modules = frozenset(path for path, _ in backbone.named_modules())
    calls, children, expected = _observe(model, backbone)
    drawn = {key.removeprefix(f"{prefix}."): model.get_parameter(key) for key in missing}
    head = _make_head(model, prefix, children, missing, name)
    sites, groups = make_sites(calls, backbone, head.sequence_linears)
    wrap_sites(backbone, sites, groups)
    head.set_sites(sites, groups)
    packed = prove_packed(backbone, model.config, groups, expected, name)
    prove_head(head, drawn, groups, expected, name)
    spec = BaseSpec(
        name=name,
        prefix=prefix,
        sites=sites,
        groups=groups,
        heads={Task.CLASSIFY: head.spec},
        fingerprint=fingerprint,
        max_length=_max_length(model.config, tokenizer, packed.padding_idx),
        modules=modules,
    )
    return BaseModel(spec, packed, {Task.CLASSIFY: head}, tokenizer, model.config.hidden_size)


def _from_pretrained(name_or_path: str | Path, name: str) -> tuple[Any, set[str], PreTrainedTokenizerBase]:
    """The task class, the parameters its checkpoint lacks, and the tokenizer."""
    if str(name_or_path).startswith(("/", ".", "~")) and not Path(name_or_path).is_dir():
        raise BaseModelUnsupported(f"base {name_or_path}: is not a folder", base=str(name_or_path))
    if (Path(name_or_path) / CONFIG_FILE).exists():
        raise BaseModelUnsupported(
            f"base {name}: the folder holds an adapter; give the base it was trained on", base=name
        )
    try:
        with _quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(name_or_path),
                num_labels=PROBE_LABELS,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelUnsupported(f"base {name}: cannot be loaded ({first_line})", base=name) from error
    missing = {str(key) for key in info["missing_keys"]} | {str(entry[0]) for entry in info["mismatched_keys"]}
    lacking = sorted(key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key)
    if lacking:
        raise BaseModelUnsupported(
            f"base {name}: its checkpoint lacks {lacking[0]} and {len(lacking) - 1} more", base=name
        )
    if not getattr(tokenizer, "is_fast", False):
        raise BaseModelUnsupported(f"base {name}: has no fast tokenizer (tokenizer.json)", base=name)
    return model, missing, tokenizer


def _observe(model: Any, backbone: nn.Module) -> tuple[Calls, dict[str, nn.Module], SeparateOutputs]:
    """What the unmodified base does: its calls, its per-sequence children (then taken off), its outputs."""
    with torch.inference_mode():
        tokens = torch.arange(5, 14)[None]
        calls = observe_calls(backbone, tokens.shape[1], lambda: backbone(input_ids=tokens))
        names = dict.fromkeys(path.split(".")[0] for path in calls.per_sequence)
        children = {name: backbone.get_submodule(name) for name in names}
        expected = separate_outputs(model, backbone)
        for name in children:
            setattr(backbone, name, None)  # architectures skip a pooler that is None; it runs in the head stage
        return calls, children, expected


def _make_head(model: nn.Module, prefix: str, children: dict[str, nn.Module], missing: set[str], name: str) -> TaskHead:
    try:
        return TaskHead(Task.CLASSIFY, model, prefix, children, missing)
    except ValueError as error:
        raise BaseModelUnsupported(f"base {name}: {error}", base=name) from error


def _max_length(config: Any, tokenizer: PreTrainedTokenizerBase, padding_idx: int | None) -> int:
    """Tokens: the base's positions, less the RoBERTa family's offset, and no more than its tokenizer says."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 0) or 512
    reserved = 0 if padding_idx is None else padding_idx + 1
    return min(positions - reserved, int(tokenizer.model_max_length))


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
