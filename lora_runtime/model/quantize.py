"""The base's projections with quantised weights; adapters stay as they are and see the input before it is quantised.

A row's result never depends on the rows beside it, which may be another tenant's: every activation scale is one row's
own. Quantisation comes after the proof of `probe.py`, which compares more closely than quantised products can be: where
an activation lies between two steps, the last bit of fp32 decides, and one step is a hundredth of the largest.

`int8` is for the CPU: weights symmetric per output channel, activations symmetric per row, products in int32 by oneDNN
through `torch._int_mm`. torch's dynamic quantised linears take one scale for a whole batch and are deprecated.
`8bit` and `4bit` are bitsandbytes' LLM.int8 without outliers, whose columns the whole batch would choose, and NF4.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import tempfile
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_runtime.adapters.base_spec import Array
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.model.wrapped import LoraLinear

_int_mm: Any = torch.ops.aten._int_mm  # [T, k] @ [k, n] of int8 in int32
_log = logging.getLogger(__name__)
_STEPS = 127  # to each side of zero: -128 has no counterpart
_PROBE_ROWS, _PROBE_WIDTH = 16, 256


class Quantization(StrEnum):
    """What the base's projections are multiplied as. Its fingerprint is that of the weights before."""

    NONE = "none"
    INT8 = "int8"  # on the CPU
    BIT8 = "8bit"  # on CUDA, by bitsandbytes
    BIT4 = "4bit"


class Int8Product(nn.Module):
    """x @ weight.T of a weight [d_out, d_in] in fp32, in int8. Not finite rows give results that are not finite."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        step = _steps(weight)  # [d_out, 1]
        self.register_buffer("quantized", _in_steps(weight, step).t().contiguous())  # [d_in, d_out]
        self.register_buffer("step", step.reshape(-1))  # [d_out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., d_in] in fp32 → [..., d_out] in fp32."""
        rows = x.reshape(-1, x.shape[-1])
        step = _steps(rows)  # [T, 1]
        product = _int_mm(_in_steps(rows, step), cast(torch.Tensor, self.quantized))
        return product.float().mul_(step).mul_(cast(torch.Tensor, self.step)).view(*x.shape[:-1], -1)


class QuantizedLinear(nn.Module):
    """A linear, or a Conv1D, by a quantised product and its bias.

    `weight` is None. Called with a weight of an adapter in its place (`torch.func.functional_call`), [d_in, d_out]
    where `transposed`, it multiplies by that one, unquantised.
    """

    def __init__(self, product: nn.Module, bias: torch.Tensor | None, *, transposed: bool) -> None:
        super().__init__()
        self.product = product
        self.transposed = transposed
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., d_in] → [..., d_out]."""
        weight, bias = cast("torch.Tensor | None", self.weight), cast("torch.Tensor | None", self.bias)
        if weight is not None:
            return F.linear(x, weight.t() if self.transposed else weight, bias)
        y = self.product(x)
        return y if bias is None else y.add_(bias)


def check_quantization(value: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Quantization:
    """The quantisation of that name; raises BaseModelUnsupported where it is unknown or cannot run on `device`, or
    beside activations of `dtype`."""
    if value not in list(Quantization):
        known = ", ".join(Quantization)
        raise BaseModelUnsupported(f"quantize {value!r} is not known; use one of {known}", quantize=value)
    chosen = Quantization(value)
    if chosen is Quantization.INT8:
        if device.type != "cpu":
            raise BaseModelUnsupported(f"quantize int8 is for the CPU, not {device}; use 8bit or 4bit", quantize=value)
        if dtype is not torch.float32:
            message = f"quantize int8 multiplies activations in float32, not in {dtype}; use dtype float32"
            raise BaseModelUnsupported(message, quantize=value)
        _check_int8_products()
    elif chosen is not Quantization.NONE:
        if device.type != "cuda":
            message = f"quantize {value} needs a base on a CUDA device, this one is on {device}; use int8 or none"
            raise BaseModelUnsupported(message, quantize=value)
        if importlib.util.find_spec("bitsandbytes") is None:
            message = f"quantize {value} needs bitsandbytes: pip install 'multilora[quantized]'"
            raise BaseModelUnsupported(message, quantize=value)
    return chosen


def quantize_linears(
    backbone: nn.Module, quantization: Quantization, parameters: Mapping[str, Array]
) -> dict[str, Array]:
    """Quantise each projection inside a LoraLinear; embeddings, norms and heads stay.

    Returns `parameters` with the weights of these in a file without a name instead of in memory: some adapters (DoRA,
    PiSSA) are read beside the base's own weights. Raises BaseModelUnsupported where a row depends on its neighbours.
    """
    kept = dict(parameters)
    before = after = 0
    for module in backbone.modules():
        if isinstance(module, LoraLinear) and type(module.base) in (nn.Linear, Conv1D):
            linear = quantized_linear(module.base, quantization)
            _check_rows_apart(linear, module.group.d_in, module.path)
            own = cast(torch.Tensor, module.base.weight)
            module.base = linear
            before += own.nbytes
            after += sum(value.nbytes for value in linear.product.state_dict().values())
            if (host := kept.get(f"{module.path}.weight")) is not None:
                kept[f"{module.path}.weight"] = _on_disk(host)
    _log.info("%s: projections of %.1f MiB now take %.1f MiB", quantization, before / (1 << 20), after / (1 << 20))
    return kept


def quantized_linear(linear: nn.Module, quantization: Quantization) -> QuantizedLinear:
    """The same projection, quantised, on its device; `linear` stays as it is."""
    transposed = isinstance(linear, Conv1D)
    own = cast(torch.Tensor, linear.weight).detach()
    weight = own.t().contiguous() if transposed else own  # [d_out, d_in]
    bias = cast("torch.Tensor | None", linear.bias)
    product = Int8Product(weight) if quantization is Quantization.INT8 else _bitsandbytes(weight, quantization)
    return QuantizedLinear(product, None if bias is None else bias.detach(), transposed=transposed)


def _bitsandbytes(weight: torch.Tensor, quantization: Quantization) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes")
    d_out, d_in = weight.shape
    if quantization is Quantization.BIT8:
        linear = bnb.nn.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False, threshold=0.0)
        linear.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        linear = bnb.nn.Linear4bit(d_in, d_out, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=linear)
    return linear.to(weight.device).eval()  # which quantises


def _steps(rows: torch.Tensor) -> torch.Tensor:
    """[n, 1]: what one step of int8 is worth in each row."""
    return (rows.abs().amax(-1, keepdim=True) / _STEPS).clamp_min_(torch.finfo(torch.float32).tiny)


def _in_steps(rows: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return (rows / step).round_().to(torch.int8)


def _check_int8_products() -> None:
    """Raise BaseModelUnsupported where the processor's int8 products are not exact: without VNNI they saturate."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-_STEPS, _STEPS + 1, (_PROBE_ROWS, _PROBE_WIDTH), generator=generator, dtype=torch.int8)
    b = torch.randint(-_STEPS, _STEPS + 1, (_PROBE_WIDTH, _PROBE_WIDTH), generator=generator, dtype=torch.int8)
    a[0], b[:, 0] = _STEPS, _STEPS
    try:
        found = _int_mm(a, b).long()
    except RuntimeError as error:
        raise BaseModelUnsupported(f"quantize int8 cannot run here ({error}); use none", quantize="int8") from error
    if not torch.equal(found, a.long() @ b.long()):
        message = "quantize int8 is not exact on this processor, which has no VNNI: its products saturate; use none"
        raise BaseModelUnsupported(message, quantize="int8")


def _check_rows_apart(linear: QuantizedLinear, d_in: int, path: str) -> None:
    """Raise BaseModelUnsupported unless rows of very different sizes give together what they give alone."""
    bias = cast("torch.Tensor | None", linear.bias)
    device = next(iter(linear.product.state_dict().values())).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, d_in, generator=generator) * torch.logspace(-3, 3, _PROBE_ROWS)[:, None]
    x = x.to(device, torch.float32 if bias is None else bias.dtype)
    with torch.inference_mode():
        together, alone = linear(x), torch.cat([linear(row[None]) for row in x])
    limit = 8 * torch.finfo(x.dtype).eps * alone.abs().amax(-1, keepdim=True)  # sums in another order
    if not bool(((together - alone).abs() <= limit).all()):
        raise BaseModelUnsupported(f"{path}: its quantised rows depend on the rows beside them; it is not served")


def _on_disk(weight: Array) -> Array:
    """A copy in a temporary file that has no name and goes with the last use; read as it is needed."""
    with tempfile.TemporaryFile(prefix="multilora-base-") as file:
        file.write(np.ascontiguousarray(weight).data)
        file.flush()
        return np.memmap(file, dtype=weight.dtype, mode="r", shape=weight.shape)
