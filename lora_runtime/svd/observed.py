"""Which modules of a model an adapter can reach, found by running it without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_runtime.adapters.base_spec import LeafKind
from lora_runtime.errors import first_line
from lora_runtime.heads.sequence_leaf import is_leaf
from lora_runtime.model.observe import Rows, observe
from lora_runtime.model.probe import probe_batch
from lora_runtime.svd.task_class import TaskClass

NOT_RUN = "is read without its module being run, so no adapter can change it"
NOT_PER_TOKEN = "is not computed token by token, and is not served per adapter"


class _AnyScalar(TorchDispatchMode):
    """Answers 1 where a model asks a tensor without values for a value: what it decides by it is only its masks."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            dtype: torch.dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def unreachable(tuned: TaskClass) -> tuple[dict[str, str], str | None]:
    """(leaf of the backbone that the server takes no change of → why, a note where that could not be found out).

    The rules are those by which a base is loaded: see `model/inject.py`.
    """
    backbone = tuned.model.base_model
    every = [path for path, module in backbone.named_modules() if is_leaf(module)]
    try:
        with torch.device("meta"), torch.inference_mode(False), torch.no_grad(), _AnyScalar():
            seen = observe(backbone, lambda: backbone(**probe_batch(backbone, "meta")))
    except Exception as error:  # noqa: BLE001 - the code of some two hundred architectures
        note = (
            f"{tuned.folder.config.model_type} does not run without weights ({first_line(error)}), so whether an "
            "adapter reaches every module was not checked: compare the adapter with the tuned model"
        )
        return {}, note
    shared = {path for path, leaf in seen.items() if Rows.SHARED in leaf.rows}
    packed = not any(seen[path].kind is LeafKind.LINEAR for path in shared)
    found = {path: NOT_RUN for path in every if path not in seen and path.split(".", 1)[0] != "pooler"}
    found |= dict.fromkeys(shared, NOT_PER_TOKEN) if packed else {}
    dot = f"{tuned.prefix}." if tuned.prefix else ""
    return {dot + path: why for path, why in found.items()}, None
