"""A base kept in 8 or 4 bits while its adapter is trained: bitsandbytes, on CUDA."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.settings import BaseBits, Optimisation, Precision


def check_quantisation(bits: BaseBits, device: torch.device) -> None:
    """Refuse what cannot be had here, before anything is loaded; raises InvalidRequest on `quantize`."""
    if bits is BaseBits.NONE:
        return
    if device.type != "cuda":
        message = f"{bits} needs a CUDA device, where bitsandbytes multiplies; this run is on {device.type}"
        raise InvalidRequest("quantize", f"{message}; train with the base whole")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidRequest("quantize", f"{bits} needs bitsandbytes: pip install 'multilora[quantized]'")


def quantisation_of(optim: Optimisation, kept_whole: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained`: NF4 with double quantisation, or int8; `kept_whole` are not quantised."""
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if optim.precision is Precision.BF16 else torch.float32
    skipped = [*kept_whole, "lm_head"]
    if optim.quantize is BaseBits.NF4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=skipped,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return {"quantization_config": config, "dtype": compute, "device_map": {"": device.index or 0}}
