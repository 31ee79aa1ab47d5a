"""Whether Triton's interpreter runs the kernels, on the CPU, and what they need to run there too."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

from typing import Any, cast

import triton


@triton.jit
def _same(value):
    return value


def _as_int(value: Any) -> int:
    return int(value.handle.data.item())


# TRITON_INTERPRET was set when Triton was imported: tensors are on the CPU, and a bf16 product would be wrong
IS_INTERPRETED = not isinstance(cast("object", _same), triton.JITFunction)
loop_bound = _as_int if IS_INTERPRETED else _same  # Triton 3.6 beside NumPy 2.4 interprets no other
