"""The oracle of the matrix is sharp: whatever a case saves changes PEFT's answer, so leaving it out would be seen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from lora_runtime.types import TokenSequence
from tests.conformance.matrix_adapters import WEIGHTS_FILE, Adapter
from tests.oracle import TaskOracle, relative_difference

# A key's bias adds the same to all scores of one query, which softmax takes away again. With bias="all", PEFT also
# writes the biases of the modules that it replaced. No embedding depends on a pooler.
_WITHOUT_EFFECT = re.compile(r"\b(key|k_lin|attn\.k)\.(.*\.)?bias$|\boriginal_module\b|\bpooler\b")


def require_every_kind_matters(
    adapter: Adapter, oracle: TaskOracle, sequences: Sequence[TokenSequence], expected: Sequence[torch.Tensor]
) -> None:
    """Fail unless each kind of tensor in the adapter's file changes the oracle's answers, `expected`."""
    tensors = dict(oracle.model.named_parameters(remove_duplicate=False)) | dict(oracle.model.named_buffers())
    for kind, names in _kinds(adapter.peft_folder / WEIGHTS_FILE, set(tensors)).items():
        kept = {name: tensors[name].detach().clone() for name in names}
        with torch.no_grad():
            for name in names:
                tensors[name].add_(0.1 * torch.randn_like(tensors[name]))
        changed = relative_difference([oracle.answer(sequence) for sequence in sequences], expected)
        ignored_by_peft = adapter.case.may_be_refused and "lora_embedding" in kind
        assert changed > 1e-3 or ignored_by_peft or _WITHOUT_EFFECT.search(kind), f"{kind} changes nothing"
        with torch.no_grad():
            for name in names:
                tensors[name].copy_(kept[name])


def _kinds(path: Path, names: set[str]) -> dict[str, list[str]]:
    """The model's tensors that the file holds, by the last parts of their keys."""
    plain = {name: _as_saved(name) for name in names}
    found: dict[str, list[str]] = {}
    for key in load_file(path):
        kind = ".".join(part for part in key.split(".")[-3:] if not part.isdigit())
        matches = [name for name, saved in plain.items() if saved in (key, f"{key}.weight")]
        found.setdefault(kind, []).extend(matches)
    return {kind: matches for kind, matches in found.items() if matches}


def _as_saved(name: str) -> str:
    for part in (".modules_to_save.default", ".default", ".modules_to_save.tuned", ".tuned"):
        name = name.replace(part, "")
    return name
