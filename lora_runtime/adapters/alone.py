"""What a folder contradicts by itself: the config against the keys and shapes, before any base is known."""

from __future__ import annotations

from lora_runtime.adapters.config import LoraConfig
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.keys import ModuleKeys, Part, SortedKeys
from lora_runtime.adapters.modules import check_companions, check_pair
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import Task

_RANK_AXIS = {Part.A: 0, Part.B: 1, Part.EMBED_A: 0, Part.EMBED_B: 1}
_COPIES = {Part.BASE_WEIGHT, Part.BASE_BIAS}
_HEADS = {"classifier", "score", "qa_outputs", "out_proj"}  # how transformers calls output layers


def check_alone(config: LoraConfig, keys: SortedKeys, task: Task | None, findings: Findings, *, kasa: bool) -> None:
    """Raise AdapterRejected, or collect, what is wrong whatever the base may be."""
    for module in keys.modules.values():
        if module.is_adapted:
            with findings.attempt():
                check_pair(module.parts)
                _check_rank(module, config)
                parts = {part: ref for part, ref in module.parts.items() if part not in _COPIES}
                check_companions(parts, module.path, config, kasa=kasa)
    with findings.attempt():
        _check_head(keys, task)


def _check_rank(module: ModuleKeys, config: LoraConfig) -> None:
    if config.use_bdlora:  # blocks have a shape of their own
        return
    rank = config.rank(module.path)
    for part, axis in _RANK_AXIS.items():
        ref = module.parts.get(part)
        if ref is not None and (len(ref.shape) != 2 or ref.shape[axis] != rank):
            message = f"has shape {list(ref.shape)}, the config gives it rank {rank}; correct r or rank_pattern"
            ref.refuse("SHAPE_MISMATCH", message)


def _check_head(keys: SortedKeys, task: Task | None) -> None:
    if task not in (Task.CLASSIFY, Task.CLASSIFY_TOKENS, Task.ANSWER):
        return
    names = {path.rpartition(".")[2] for path, module in keys.modules.items() if module.params}
    if names.isdisjoint(_HEADS):
        message = f"has no output layer to {task}; train it with the head in modules_to_save"
        raise AdapterRejected("HEAD_MISSING", "the weights", message)
