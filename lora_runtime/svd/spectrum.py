"""One matrix by its singular values: how much each rank keeps of it, and the factors of one rank.

The singular values come from the Gram matrix of the smaller side in float64. Its error, some 1e-16 of the largest
squared singular value, lies below that of an SVD in float32, whose input the matrix is; and its cost grows with the
square of the smaller side instead of the product of both. The factors are projections on the eigenvectors, so that at
full rank they reproduce the matrix to the rounding of their own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_runtime.errors import InvalidRequest

_CHUNK_ELEMENTS = 1 << 20  # of the longer side's rows at a time: no float64 copy of a whole matrix is made
_FULL = 1.0

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Squared singular values, largest first, in float64."""

    squares: Values

    @property
    def total(self) -> float:
        """The squared Frobenius norm."""
        return float(self.squares.sum())

    @property
    def numerical_rank(self) -> int:
        """How many stand out from rounding."""
        floor = len(self.squares) * np.finfo(np.float64).eps * (self.squares[0] if len(self.squares) else 0.0)
        return int((self.squares > floor).sum())

    def energy(self, rank: int) -> float:
        """The share of the squared norm that the best approximation of a rank keeps (Eckart and Young 1936)."""
        return float(self.squares[:rank].sum() / self.total) if self.total else 1.0

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps `energy`; of all of it, every value that stands out from rounding."""
        if energy >= _FULL:
            return self.numerical_rank
        kept = np.cumsum(self.squares)
        return min(int(np.searchsorted(kept, energy * kept[-1])) + 1, len(self.squares))


@dataclass(frozen=True, slots=True)
class Decomposed:
    """A matrix with the singular vectors of its smaller side."""

    matrix: torch.Tensor  # [m, n] float32
    spectrum: Spectrum
    vectors: torch.Tensor  # [k, k] float64, k the smaller of m and n: columns by falling singular value

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [rank, n], B [m, rank]): `B @ A` is the best approximation, the singular values shared out as roots."""
        tall = self.matrix if self.matrix.shape[0] >= self.matrix.shape[1] else self.matrix.T
        kept = self.vectors[:, :rank]
        squares = torch.from_numpy(self.spectrum.squares[:rank].copy())
        roots = squares.clamp_min(torch.finfo(torch.float64).tiny).pow(0.25)
        long = torch.empty(tall.shape[0], rank, dtype=dtype)
        for rows in _chunks(tall):
            long[rows] = (tall[rows].double() @ kept / roots).to(dtype)
        short = (kept * roots).to(dtype)
        check_finite(long, short)
        return (short.T.contiguous(), long) if tall is self.matrix else (long.T.contiguous(), short)

    def error(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """‖matrix − B A‖ / ‖matrix‖ of the factors as they will be read, their rounding included."""
        a = a.float()
        squares = 0.0
        for rows in _chunks(self.matrix):
            rest = self.matrix[rows] - b[rows].float() @ a
            squares += float(rest.square_().sum(dtype=torch.float64))
        return (squares / self.spectrum.total) ** 0.5 if self.spectrum.total else 0.0


def decompose(matrix: torch.Tensor) -> Decomposed:
    """The spectrum of a [m, n] float32 matrix, and the vectors that its factors need."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in _chunks(tall):
        part = tall[rows].double()
        gram.addmm_(part.T, part)
    squares, vectors = torch.linalg.eigh(gram)
    return Decomposed(matrix, Spectrum(squares.flip(0).clamp_min_(0).numpy()), vectors.flip(1))


def decompose_core(core: torch.Tensor) -> tuple[torch.Tensor, Spectrum, torch.Tensor]:
    """(U, spectrum, V^T) of a small square matrix in float64."""
    u, s, vh = torch.linalg.svd(core)
    return u, Spectrum(s.square().numpy()), vh


def check_finite(*factors: torch.Tensor) -> None:
    """Raise InvalidRequest where a dtype is too narrow for a factor."""
    for factor in factors:
        if not bool(torch.isfinite(factor).all()):
            name = str(factor.dtype).removeprefix("torch.")
            raise InvalidRequest("dtype", f"{name} cannot hold the factors of this change; write float32")


def squared_norm(matrix: torch.Tensor) -> float:
    """‖matrix‖², summed in float64."""
    flat = matrix.reshape(-1)
    steps = range(0, flat.numel(), _CHUNK_ELEMENTS)
    return sum(float(flat[i : i + _CHUNK_ELEMENTS].double().square_().sum()) for i in steps)


def _chunks(matrix: torch.Tensor) -> list[slice]:
    """Slices of rows, of some `_CHUNK_ELEMENTS` elements each."""
    step = max(1, _CHUNK_ELEMENTS // max(matrix.shape[1], 1))
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
