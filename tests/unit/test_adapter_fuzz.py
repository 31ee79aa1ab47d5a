"""Whatever a folder holds, it is served or refused with a reason: no other error leaves the reader."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.config import LoraConfig
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.plan import plan_adapter
from lora_runtime.errors import AdapterRejected
from tests.unit.base_specs import VOCABULARY, WIDTH, spec_of
from tests.unit.peft_folders import CONFIG, NO_LIMIT, WEIGHTS, change_config, save

ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DoRA and an embedding": ("llama", "CAUSAL_LM", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "biases and tokens": ("bert", "SEQ_CLS", {"bias": "all", "trainable_token_indices": [1, 2]}),
    "kept tying": (
        "tied-llama", "CAUSAL_LM", {"ensure_weight_tying": True, "target_modules": ["v_proj", "embed_tokens"]}
    ),
}  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 2.5, "", "x", "(", "all-linear", [], ["q_proj"], [1], [[1]], [None], {}, {"a": 1},
    {"a": "b"}, {"q": [1]}, 1e400, 10**30, "\ud800", {"nblocks": 0}, {"target_modules_bd_a": ["q"], "nblocks": 2},
)  # fmt: skip
SHAPES = ((), (0,), (3,), (4, WIDTH), (WIDTH, 4), (VOCABULARY, WIDTH), (VOCABULARY + 3, WIDTH), (2, 2, 2))


def look(folder: Path, base: BaseSpec) -> None:
    """Everything that reads a folder; a refusal is right, any other error is a bug."""
    for plan_base in (base, None):
        plan_adapter(folder, plan_base, Findings(collect=True))
    with suppress(AdapterRejected):
        read_checkpoint(folder, base, NO_LIMIT)


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_value_of_a_config_field_is_an_error_of_ours(tmp_path: Path, name: str) -> None:
    family, task_type, config = ADAPTERS[name]
    folder, base = save(family, task_type, tmp_path / "a", **config), spec_of(family)
    content = (folder / CONFIG).read_text()
    for field in (*LoraConfig.model_fields, "unknown"):
        for value in VALUES:
            (folder / CONFIG).write_text(content)
            change_config(folder, **{field: value})
            look(folder, base)


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_set_of_tensors_is_an_error_of_ours(tmp_path: Path, name: str) -> None:
    family, task_type, config = ADAPTERS[name]
    folder, base, rng = save(family, task_type, tmp_path / "a", **config), spec_of(family), random.Random(name)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for _ in range(200):
        changed = dict(tensors)
        for _ in range(rng.randint(1, 3)):
            _change(changed, tensors, rng)
        safetensors.torch.save_file({key: value.clone() for key, value in changed.items()}, folder / WEIGHTS)
        look(folder, base)


def _change(tensors: dict[str, torch.Tensor], known: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Drop, reshape or rename one tensor."""
    key = rng.choice(sorted(tensors))
    match rng.randrange(3):
        case 0:
            tensors.pop(key)
        case 1:
            tensors[key] = torch.ones(rng.choice(SHAPES))
        case _:
            pieces = key.split(".")
            pieces[rng.randrange(len(pieces))] = rng.choice(rng.choice(sorted(known)).split("."))
            tensors[".".join(pieces)] = tensors.pop(key)


def test_no_header_is_an_error_of_ours(tmp_path: Path) -> None:
    folder, base, rng = save("bert", "SEQ_CLS", tmp_path / "a"), spec_of("bert"), random.Random(0)
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(300):
        changed = json.loads(json.dumps(header))
        entry = changed[rng.choice(sorted(changed))]
        field = rng.choice(("shape", "dtype", "data_offsets"))
        entry[field] = rng.choice(([], [0], [-1, 2], "x", None, [True], [10**20, 0], [5, 1], ["a", 2], "F64", "BF16"))
        written = json.dumps(changed).encode()
        (folder / WEIGHTS).write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])
        look(folder, base)
