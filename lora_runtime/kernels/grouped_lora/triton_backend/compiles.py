"""How many kernels of this package were compiled: after the warm-up, none may be."""

from __future__ import annotations

from typing import Any

from triton import knobs

_KERNELS = "lora_runtime.kernels."  # whose modules they are in


class CompileCounter:
    """Counts each new specialisation of our kernels, compiled or read from Triton's disk cache: both take long.

    It takes its place in Triton's hook after a compilation, before the hook that was there. The interpreter
    compiles nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._next: Any = knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_post_compile_hook = self

    def __call__(self, *, fn: Any, **details: Any) -> Any:
        if fn.module.startswith(_KERNELS):
            self.count += 1
        return None if self._next is None else self._next(fn=fn, **details)


_counter = CompileCounter()


def num_compiled() -> int:
    """Kernels of this package compiled since it was imported, in this process."""
    return _counter.count
