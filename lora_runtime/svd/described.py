"""The files beside the weights of an extracted adapter: PEFT's config, what serving needs to know, the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_runtime.adapters.card import TASK_OF_TYPE
from lora_runtime.adapters.fingerprint import fingerprint_parameters
from lora_runtime.adapters.folder import AdapterFolder
from lora_runtime.adapters.metadata import LABELLED_TASKS, AdapterMetadata
from lora_runtime.adapters.pooling import read_pooling
from lora_runtime.adapters.tokenizer import TOKENIZER_FILE, TOKENIZER_FILES, tokenizer_digest
from lora_runtime.svd.layout import rank_fields, target_names, whole_names
from lora_runtime.svd.task_class import TaskClass
from lora_runtime.types import ProblemType, Task

_TYPE_OF_TASK = {task: name for name, task in TASK_OF_TYPE.items()}


def config_of(
    tuned: TaskClass, base_name: str, ranks: Mapping[str, int], whole: Collection[str], bias: str
) -> dict[str, Any]:
    """adapter_config.json, as PEFT reads it."""
    modules = [path for path, _ in tuned.model.named_modules(remove_duplicate=False)]
    return {
        "peft_type": "LORA",
        "task_type": _TYPE_OF_TASK[tuned.task],
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": target_names(ranks, modules),
        "modules_to_save": whole_names(whole, modules) or None,
        "bias": bias,
        "fan_in_fan_out": any(map(tuned.is_conv1d, ranks)),
        "lora_dropout": 0.0,
        **rank_fields(ranks),
    }


def metadata_of(base: TaskClass, tuned: TaskClass) -> AdapterMetadata:
    """multilora.json, as `multilora train` writes it, from the tuned model's config and the base's weights."""
    config, task = tuned.folder.config, tuned.task
    embeds = task is Task.EMBED
    pooling, normalize = read_pooling(_files_of(tuned.folder.path)) if embeds else (None, False)
    pad = getattr(config, "pad_token_id", None)
    return AdapterMetadata(
        task=task,
        problem_type=_problem_type(config) if task is Task.CLASSIFY else ProblemType.SINGLE_LABEL,
        labels=tuple(str(config.id2label[row]) for row in sorted(config.id2label)) if task in LABELLED_TASKS else None,
        pad_token_id=pad if isinstance(pad, int) and pad >= 0 else None,
        pooling=pooling,
        normalize=normalize,
        token_types=True if task is Task.ANSWER else None,  # a whole model is given them, PEFT's class is not
        base_model_name=base.folder.name,
        base=_fingerprint(base),
    )


def _problem_type(config: Any) -> ProblemType:
    """As transformers itself decides where the config does not say."""
    if config.problem_type:
        return ProblemType(config.problem_type)
    return ProblemType.REGRESSION if config.num_labels == 1 else ProblemType.SINGLE_LABEL


def _fingerprint(base: TaskClass) -> Any:
    dot = f"{base.prefix}." if base.prefix else ""
    names = [name for name, _ in base.model.base_model.named_parameters()]
    return fingerprint_parameters(names, lambda name: base.read(dot + name), base.folder.config)


def copy_tokenizer(base: Path, tuned: Path, out: Path) -> None:
    """Copy the tuned model's tokenizer where it is not the base's: other tokens, another chat template."""
    if not (tuned / TOKENIZER_FILE).is_file() or _tokenizer(base) == _tokenizer(tuned):
        return
    for name in TOKENIZER_FILES:
        if (tuned / name).is_file():
            shutil.copyfile(tuned / name, out / name)


def _tokenizer(folder: Path) -> dict[str, Any]:
    """What of a folder's tokenizer can make a difference; the rest depends on the version that saved it."""
    found: dict[str, Any] = {}
    if (folder / TOKENIZER_FILE).is_file():
        found["ids"] = tokenizer_digest((folder / TOKENIZER_FILE).read_bytes())
    for name in TOKENIZER_FILES[1:]:
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8")
            content = json.loads(text) if name.endswith(".json") else {"chat_template": text}
            found |= {key: content[key] for key in ("chat_template", "eos_token") if key in content}
    return found


def _files_of(folder: Path) -> AdapterFolder:
    return AdapterFolder(folder, folder, (), None)
