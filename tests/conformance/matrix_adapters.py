"""The folders of a case's adapters, and PEFT's answers from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.conformance.cases import Case, Layout
from tests.conformance.families import Base
from tests.oracle import TaskOracle, make_task_adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SUBFOLDER = "tuned"


@dataclass(frozen=True)
class Adapter:
    """One adapter of a case on disk."""

    case: Case
    base: Base
    seed: int
    folder: Path  # what is served
    peft_folder: Path  # what PEFT reads

    def oracle(self) -> TaskOracle:
        """PEFT with this adapter alone, on a fresh base."""
        return TaskOracle(
            self.base.folder,
            self.peft_folder,
            self.case.task,
            num_labels=self.case.num_labels(self.seed),
            vocab_size=_vocab_size(self.case, self.base),
            last_token=self.base.family.is_decoder,
        )


def make(case: Case, base: Base, seed: int, root: Path) -> Adapter:
    """Save the case's adapter of one seed under `root`."""
    folder = root / f"{case.id}-{seed}"
    config = case.config(base, seed)
    named = case.layout is Layout.NAMED
    make_task_adapter(
        base.folder,
        folder,
        case.task,
        config,
        num_labels=case.num_labels(seed),
        seed=seed + 1,
        vocab_size=_vocab_size(case, base),
        name=SUBFOLDER if named else "default",
    )
    if case.new_tokens:
        _save_tokenizer(base.folder, folder, case.new_tokens)
    peft_folder = folder / SUBFOLDER if named else folder
    # Saving sorts the keys of a config; one written by hand, or by another version, need not be sorted.
    _edit_config(peft_folder / CONFIG_FILE, {field: config[field] for field in case.reorder} | case.edits)
    if case.dtype != "float32":
        _save_as(peft_folder / WEIGHTS_FILE, getattr(torch, case.dtype))
    if case.layout is Layout.SHARDED:
        peft_folder, folder = folder, _shard(folder)
    return Adapter(case, base, seed, folder, peft_folder)


def _vocab_size(case: Case, base: Base) -> int | None:
    return base.vocab_size + case.new_tokens if case.new_tokens else None


def _save_tokenizer(base: Path, folder: Path, new_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new-{i}>" for i in range(new_tokens)])
    tokenizer.save_pretrained(folder)


def _edit_config(path: Path, edits: Mapping[str, object]) -> None:
    if edits:
        path.write_text(json.dumps(json.loads(path.read_text()) | edits, indent=2))


def _save_as(path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _shard(folder: Path) -> Path:
    """A copy whose tensors lie in two files with an index, as transformers shards a checkpoint."""
    sharded = folder.with_name(f"{folder.name}-sharded")
    shutil.copytree(folder, sharded)
    (sharded / WEIGHTS_FILE).unlink()
    tensors = load_file(folder / WEIGHTS_FILE)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in (0, 1):
        shard = f"adapter_model-0000{i + 1}-of-00002.safetensors"
        part = names[i::2]
        save_file({name: tensors[name] for name in part}, sharded / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (sharded / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    return sharded
