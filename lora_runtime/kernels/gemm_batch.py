"""Many small fp32 products in one call of MKL's `cblas_sgemm_batch`, whose threads take whole products.

torch is linked with MKL on x86 and its own `bmm` calls this routine, but torch offers it for equal shapes alone. Here
every product has its own shape, strides and factor. Source: oneMKL reference, "cblas_?gemm_batch".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
FloatArray = NDArray[np.float32]
_Sizes = tuple[Int32Array | int, Int32Array | int, Int32Array | int]

_ROW_MAJOR, _NO_TRANSPOSE = 101, 111
_FLOAT_BYTES = 4
_TOLERANCE = 1e-5  # relative, of the proof


class Products:
    """n products `c_i = alpha_i * a_i @ b_i + beta * c_i`, a_i [m, k], b_i [k, n], c_i [m, n], rows contiguous.

    All a_i lie in one tensor and all c_i in another, at given places; the b_i lie anywhere. One object serves every
    layer whose operands have the same shapes and places.
    """

    def __init__(
        self,
        count: int,
        shapes: _Sizes,
        strides: _Sizes,
        a_places: Int64Array,
        c_places: Int64Array,
        beta: float = 0.0,
    ) -> None:
        """`shapes` m, n, k and `strides` of the rows of a, b, c, each [count] or one for all.

        `a_places` and `c_places` [count] are the first elements of each a_i and c_i. Strides and places in elements.
        """
        self.count = count
        self.a_bytes, self.c_bytes = a_places * _FLOAT_BYTES, c_places * _FLOAT_BYTES
        self._sizes = sizes = np.ones((8, count), dtype=np.int32)
        sizes[0] = _NO_TRANSPOSE
        sizes[1], sizes[2], sizes[3] = shapes
        sizes[4], sizes[5], sizes[6] = strides
        self._factors = np.full((2, count), beta, dtype=np.float32)
        self.alpha = self._factors[0]
        self.alpha[:] = 1.0
        self._addresses = np.empty((3, count), dtype=np.int64)
        self.a, self.b, self.c = self._addresses
        size, factor, address = self._sizes.ctypes.data, self._factors.ctypes.data, self._addresses.ctypes.data
        trans, m, n, k, lda, ldb, ldc, ones = range(size, size + 32 * count, 4 * count) if count else (size,) * 8
        alpha, beta_at = factor, factor + 4 * count
        a, b, c = address, address + 8 * count, address + 16 * count
        self.arguments = _ROW_MAJOR, trans, trans, m, n, k, alpha, a, lda, b, ldb, beta_at, c, ldc, count, ones


class GemmBatch:
    """The routine, found and proved."""

    def __init__(self, routine: Callable[..., None]) -> None:
        self._routine = routine

    def run(self, products: Products, a: torch.Tensor, b: Int64Array, c: torch.Tensor) -> None:
        """Compute them from `a` into `c`; `b` [count] are addresses, of matrices that outlive the call."""
        if products.count:
            np.add(products.a_bytes, a.data_ptr(), out=products.a)
            np.add(products.c_bytes, c.data_ptr(), out=products.c)
            products.b[:] = b
            self._routine(*products.arguments)

    @staticmethod
    @cache
    def find() -> GemmBatch | None:
        """None where torch has no MKL, or an MKL whose answers are not right."""
        if not torch.backends.mkl.is_available():
            return None
        try:
            routine = ctypes.CDLL(str(_torch_library())).cblas_sgemm_batch
        except (OSError, AttributeError):
            return None
        routine.restype = None
        pointer, number = ctypes.c_void_p, ctypes.c_int
        routine.argtypes = [number, *[pointer] * 13, number, pointer]
        found = GemmBatch(routine)
        return found if found._is_right() else None

    def _is_right(self) -> bool:
        """Two products of different shapes, one added to what is there, against torch."""
        generator = torch.Generator().manual_seed(0)
        (m, n, k), a_places, c_places = np.array(((3, 17), (5, 8), (40, 40)), dtype=np.int32), (0, 120), (0, 15)
        a, b, c = (torch.randn(size, generator=generator) for size in (120 + 680, 200 + 320, 15 + 136))
        wanted = c.clone()
        for i, b_place in enumerate((0, 200)):
            rows = a[a_places[i] :][: m[i] * k[i]].view(m[i], k[i])
            matrix = b[b_place:][: k[i] * n[i]].view(k[i], n[i])
            wanted[c_places[i] :][: m[i] * n[i]].view(m[i], n[i]).addmm_(rows, matrix, alpha=0.5)
        products = Products(2, (m, n, k), (k, n, n), np.array(a_places), np.array(c_places), beta=1.0)
        products.alpha[:] = 0.5
        self.run(products, a, b.data_ptr() + _FLOAT_BYTES * np.array((0, 200)), c)
        return bool((c - wanted).norm() <= _TOLERANCE * wanted.norm())


def addresses(tensor: torch.Tensor, elements: Int64Array) -> Int64Array:
    """The addresses of the given elements of an fp32 tensor's memory."""
    return elements * _FLOAT_BYTES + tensor.data_ptr()


def _torch_library() -> Path:
    """The shared object that holds torch's operators of the CPU."""
    folder = Path(torch.__file__).parent / "lib"
    return next((path for path in sorted(folder.glob("libtorch_cpu.*"))), folder / "libtorch_cpu.so")
