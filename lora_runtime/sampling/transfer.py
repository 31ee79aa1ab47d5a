"""Numbers from the host to the device of the logits, without a wait for what was launched there before."""

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
