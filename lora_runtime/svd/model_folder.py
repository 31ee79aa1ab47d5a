"""A model's folder: its config, and its safetensors read one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from lora_runtime.adapters.config import CONFIG_FILE as ADAPTER_CONFIG_FILE
from lora_runtime.errors import CheckpointRejected, first_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATING = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies."""

    file: str
    key: str
    dtype: str  # as the format writes it: "BF16"
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        """Whether it holds weights that can be subtracted: not the integers of buffers and quantised weights."""
        return self.dtype in _FLOATING


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A transformers checkpoint. Only its headers have been read."""

    path: Path
    role: str  # "base" or "tuned", for messages
    config: Any
    tensors: Mapping[str, Stored]  # by key

    @property
    def name(self) -> str:
        """The folder's own name: no path of this machine."""
        return self.path.resolve().name

    def where(self, stored: Stored) -> str:
        """For messages: which model, file and tensor."""
        return f"{self.role} {self.path / stored.file} tensor {stored.key}"

    def reject(self, stored: Stored, message: str) -> NoReturn:
        """Raise CheckpointRejected for a tensor."""
        raise CheckpointRejected(self.where(stored), message)

    def read(self, stored: Stored) -> torch.Tensor:
        """A copy in the dtype in which transformers loads it; raises CheckpointRejected unless it is finite.

        The file is opened for each tensor: pages of a file that stays mapped would count as this process's memory.
        """
        if not stored.is_floating:
            message = f"holds {stored.dtype}, which is no plain weight; give a model that is not quantised"
            self.reject(stored, message)
        with _readable(self.role, self.path / stored.file), safe_open(self.path / stored.file, "pt") as file:
            tensor = file.get_tensor(stored.key).clone()
        if not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            self.reject(stored, "has a NaN or an infinite value; its training diverged, or the file is damaged")
        return tensor.to(getattr(self.config, "dtype", None) or tensor.dtype)


def open_model(path: Path, role: str) -> ModelFolder:
    """Read a folder's config and the headers of its weights; raises CheckpointRejected with the remedy."""
    place = f"{role} {path}"
    if not path.is_dir():
        fault = (
            "is a file, not a folder" if path.exists() else "is no folder; give that of a model that is on this disk"
        )
        raise CheckpointRejected(place, fault)
    if (path / ADAPTER_CONFIG_FILE).exists():
        raise CheckpointRejected(place, "holds an adapter, not a whole model; to lower its rank use compress")
    return ModelFolder(path, role, _read_config(path, place), _read_headers(path, role))


def _read_config(path: Path, place: str) -> Any:
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointRejected(place, f"has no {CONFIG_FILE}; save the model with save_pretrained")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        message = f"is not a config that transformers understands ({first_line(error)})"
        raise CheckpointRejected(f"{place}/{CONFIG_FILE}", message) from error
    if getattr(config, "quantization_config", None):
        message = "says that the weights are quantised; give the model in float32, bfloat16 or float16"
        raise CheckpointRejected(f"{place}/{CONFIG_FILE} field quantization_config", message)
    return config


def _read_headers(path: Path, role: str) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    index = _read_index(path, role)
    for name in [WEIGHTS_FILE] if index is None else sorted(set(index.values())):
        with _readable(role, path / name), safe_open(path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                entry = file.get_slice(key)
                if key in tensors:
                    message = f"is in {tensors[key].file} too; save the model again"
                    raise CheckpointRejected(f"{role} {path / name} tensor {key}", message)
                tensors[key] = Stored(name, key, str(entry.get_dtype()), tuple(entry.get_shape()))
    if lacking := sorted((index or {}).keys() - tensors.keys()):
        raise CheckpointRejected(f"{role} {path / INDEX_FILE}", f"names {lacking[0]}, which no file of it has")
    return tensors


def _read_index(path: Path, role: str) -> dict[str, str] | None:
    """Tensor → file of a sharded model, None of one in one file."""
    if (path / WEIGHTS_FILE).is_file():
        return None
    if not (path / INDEX_FILE).is_file():
        pickle = next(path.glob("pytorch_model*.bin"), None)
        if pickle is not None:
            message = (
                "is a pickle, which can run code and is never read; load the model with transformers and save it "
                "again with save_pretrained, which writes safetensors"
            )
            raise CheckpointRejected(f"{role} {pickle}", message)
        raise CheckpointRejected(f"{role} {path}", f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    try:
        weight_map = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        index = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = "has no weight_map of tensors to files"
        raise CheckpointRejected(f"{role} {path / INDEX_FILE}", message) from error
    for name in set(index.values()):
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointRejected(f"{role} {path / INDEX_FILE}", f"names {name!r}, which is not in the folder")
    return index


@contextmanager
def _readable(role: str, path: Path) -> Generator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        message = f"cannot be read as safetensors ({first_line(error)}); copy or save it again"
        raise CheckpointRejected(f"{role} {path}", message) from error
