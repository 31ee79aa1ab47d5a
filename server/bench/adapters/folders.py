"""Adapter folders as PEFT saves them, thousands at once: files of weights are written once and linked from then on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

from server.bench.adapters.plan import NUM_LABELS, RANK, TARGETS

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Template:
    """What PEFT saves for one kind of adapter: its config, and the shapes by key."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    @classmethod
    def make(cls, base: str, folder: Path, *, rank: int = RANK, targets: tuple[str, ...] = TARGETS) -> Template:
        """Have PEFT save a sequence classifier once, in `folder`."""
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=NUM_LABELS)
        config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=list(targets))
        get_peft_model(model, config).save_pretrained(str(folder))
        saved: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        saved["base_model_name_or_path"] = Path(base).parent.name
        return cls(saved, {key: array.shape for key, array in load_file(folder / WEIGHTS_FILE).items()})

    def write_weights(self, file: Path, seed: int) -> Path:
        """Random values, large enough that no adapter's answer passes for another's."""
        chance = np.random.default_rng(seed)
        tensors = {
            key: (_deviation(key, shape) * chance.standard_normal(shape, np.float32)).astype(np.float32)
            for key, shape in self.shapes.items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
        return file

    def write_folder(self, folder: Path, weights: Path) -> Path:
        """A folder with a config of its own and a link to `weights`."""
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        os.link(weights, folder / WEIGHTS_FILE)
        return folder


@dataclass(frozen=True, slots=True)
class Weights:
    """The different files of weights. Adapter `number` has file `number % len(files)`."""

    template: Template
    files: tuple[Path, ...]

    @classmethod
    def make(cls, base: str, folder: Path, count: int) -> Weights:
        template = Template.make(base, folder / "template")
        return cls(template, tuple(template.write_weights(folder / f"{i}.safetensors", i) for i in range(count)))

    def file_of(self, number: int) -> int:
        return number % len(self.files)

    def write_root(self, root: Path, numbers: Iterable[int]) -> Path:
        """A folder for each adapter, directly below `root`."""
        for number in numbers:
            self.template.write_folder(root / name_of(number), self.files[self.file_of(number)])
        return root


def name_of(number: int) -> str:
    return f"a{number:05d}"


def _deviation(key: str, shape: tuple[int, ...]) -> float:
    if "lora_A" in key:
        return float(shape[-1] ** -0.5)
    return 0.05 if "lora_B" in key else 0.1
