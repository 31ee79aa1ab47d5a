"""Captures that need no accelerator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_runtime.model.capture import Captured, Forward


class Again:
    """Makes the call again: what a graph does, without its speed."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def replay(self) -> torch.Tensor:
        return self._forward()


@dataclass
class RecordingCapture:
    """Captures by keeping the call; each is said to take `bytes_each`."""

    bytes_each: int = 0
    count: int = 0
    fails: bool = False
    runs: bool = False  # the call once, as CUDA's captures do
    beside = None

    def capture(self, forward: Forward) -> Captured:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        if self.runs:
            forward()
        self.count += 1
        return Again(forward)

    def reserved_bytes(self) -> int:
        return self.count * self.bytes_each
