"""The folder of an adapter that PEFT trained."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save

from lora_runtime.adapters.folder import WEIGHTS_FILE
from lora_runtime.adapters.metadata import AdapterMetadata
from lora_runtime.adapters.writing import write_config, write_metadata


def write_adapter(folder: Path, model: PeftModel, metadata: AdapterMetadata) -> None:
    """Write the three files of an adapter; the digests of the first two are added to `metadata`.

    The base's name in adapter_config.json is that of `metadata`: a hint, never a path of this machine.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # save() and write_bytes(), since save_file() leaves a file that only its owner may read
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    config = model.peft_config["default"].to_dict()
    write_config(folder, config | {"base_model_name_or_path": metadata.base_model_name, "inference_mode": True})
    write_metadata(folder, metadata)
