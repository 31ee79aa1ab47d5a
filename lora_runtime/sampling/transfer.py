"""Numbers from the host to a device and back, without a wait for what else was launched there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def on_device(values: Sequence[int] | np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The values, of their own type, [n] int64 where they are a list."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=torch.int64)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # torch keeps the memory until the copy was made


class ToHost:
    """Tensors of one device on their way to the host, since it was made: what is launched later is not waited for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._host = list(tensors)
        self._arrived: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:  # page-locked, or the copy itself would wait
            self._host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
            for target, source in zip(self._host, tensors, strict=True):
                target.copy_(source, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
