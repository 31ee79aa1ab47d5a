"""Where a base computes and in which precision, and moving it there once it was proved on the CPU in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lora_runtime.device_memory import DeviceMemory
from lora_runtime.errors import BaseModelUnsupported

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative Frobenius error of all layers together, against the CPU in fp32: what rounding may do, and no more.
MOVED_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


@dataclass(frozen=True, slots=True)
class Placement:
    """A device that torch can use here, and the dtype of weights and activations."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @property
    def is_proved(self) -> bool:
        """Whether it is where bases are proved: the CPU in fp32."""
        return self.device.type == "cpu" and self.dtype is torch.float32


PROVED = Placement()


def resolve_placement(device: str, dtype: str) -> Placement:
    """The placement of that name; raises BaseModelUnsupported for one that is unknown or not to be had here."""
    if dtype not in DTYPES:
        raise BaseModelUnsupported(f"dtype {dtype!r} is not served; use one of {', '.join(DTYPES)}", dtype=dtype)
    return Placement(_device(device), DTYPES[dtype])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BaseModelUnsupported(
            f"device {name!r} is not served; use cpu, cuda, or cuda:N for one of many", device=name
        )
    if device.type == "cpu":
        return CPU
    if not torch.cuda.is_available():
        built = "torch sees no CUDA device here" if torch.version.cuda else "this build of torch is for the CPU alone"
        message = f"device {name!r} is not available: {built}; use cpu, or install torch for CUDA and its driver"
        raise BaseModelUnsupported(message, device=name)
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise BaseModelUnsupported(f"device {name!r} is not available: there are {count}, from cuda:0 on", device=name)
    return torch.device("cuda", index)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """What this process holds of a device; None for a CPU. From any thread, and no call to the driver: that could
    break the capture of a graph in another one."""
    if device.type != "cuda":
        return None
    capacity = torch.cuda.get_device_properties(device).total_memory
    return DeviceMemory(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), capacity)


def place_modules(roots: Iterable[nn.Module], placement: Placement) -> None:
    """Move modules in place; a parameter that several of them share stays one.

    Buffers that no checkpoint has (a rotary embedding's frequencies) keep their dtype: rounded, they would turn
    positions far into a text by another angle.
    """
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the first of a pair keeps its id from being used again

    def place(tensor: torch.Tensor, *, keeps_dtype: bool = False) -> torch.Tensor:
        if tensor.is_meta:  # of a part that is never run
            return tensor
        if id(tensor) not in moved:
            casts = tensor.is_floating_point() and not keeps_dtype
            moved[id(tensor)] = tensor, tensor.to(placement.device, placement.dtype if casts else tensor.dtype)
        return moved[id(tensor)][1]

    for module in (module for root in roots for module in root.modules()):
        persistent = module.state_dict(keep_vars=True).keys()
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = place(parameter)
            setattr(
                module, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            )
            moved[id(parameter)] = parameter, getattr(module, name)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, place(buffer, keeps_dtype=name not in persistent))
