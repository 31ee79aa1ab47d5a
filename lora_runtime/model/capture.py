"""Capturing what a forward pass launches, to launch it again at once: by CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Forward = Callable[[], torch.Tensor]
_WARM_UPS = 2  # before a capture, which must not allocate workspaces or choose algorithms


class Captured(Protocol):
    """One captured forward pass."""

    def replay(self) -> torch.Tensor:
        """Run it again on what its input tensors hold now; the output is overwritten by the next replay of any."""
        ...


class GraphCapture(Protocol):
    """A way to capture; the tests have one that needs no accelerator."""

    @property
    def beside(self) -> torch.cuda.Stream | None:
        """Where a forward pass may launch what it needs later, to run at the same time as the rest."""
        ...

    def capture(self, forward: Forward) -> Captured:
        """Capture a call that reads tensors whose addresses stay, and that waits for nothing. Raises RuntimeError."""
        ...

    def reserved_bytes(self) -> int:
        """Device memory that torch holds now."""
        ...


class CudaCapture:
    """CUDA graphs in one memory pool: they replay one at a time, and each may overwrite what another computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._beside = torch.cuda.Stream(device)

    @property
    def beside(self) -> torch.cuda.Stream | None:
        return self._beside

    def capture(self, forward: Forward) -> Captured:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                forward()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader that copies an image meanwhile does not end the capture
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = forward()
        return _CudaGraph(graph, output)

    def reserved_bytes(self) -> int:
        torch.cuda.empty_cache()  # what the warm-ups left is no graph's
        return torch.cuda.memory_reserved(self._device)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph = graph
        self._output = output

    def replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._output
