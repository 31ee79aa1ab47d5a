"""The adapter folder of what was trained; `adapters/writing.py` stages and publishes it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from lora_runtime.adapters.folder import WEIGHTS_FILE
from lora_runtime.adapters.metadata import AdapterMetadata
from lora_runtime.adapters.writing import write_config, write_metadata
from lora_runtime.train.lora import Adapter


def write_adapter(folder: Path, adapter: Adapter, metadata: AdapterMetadata) -> None:
    """Write the three files of an adapter; the digests of the first two are added to `metadata`.

    The base's name in adapter_config.json is that of `metadata`: a hint, never a path of this machine.
    """
    # save() and write_bytes(), since save_file() leaves a file that only its owner may read
    (folder / WEIGHTS_FILE).write_bytes(save(adapter.tensors(), metadata={"format": "pt"}))
    named = {"base_model_name_or_path": metadata.base_model_name, "inference_mode": True}
    write_config(folder, adapter.config() | named)
    write_metadata(folder, metadata)
