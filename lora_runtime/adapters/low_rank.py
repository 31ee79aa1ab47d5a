"""Every low-rank variant as plain A and B, so that one kernel serves all of them.

The decompositions are PEFT's own, in float64 where it has float32; which signs an SVD or QR has does not matter,
since only products are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_runtime.adapters.header import Array

Array64 = np.ndarray[Any, np.dtype[np.float64]]

_CHUNK_ELEMENTS = 1 << 20  # of a weight matrix at a time: no copy of a whole one is made


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scaling * b @ a`: a [rank, d_in], b [d_out, rank]."""

    a: Array
    b: Array
    scaling: float


def dense(blocks: Array, num_blocks: int) -> Array:
    """BD-LoRA: a matrix whose diagonal blocks are saved one above the other."""
    if num_blocks == 1:
        return blocks
    rows, columns = blocks.shape[0] // num_blocks, blocks.shape[1]
    whole = np.zeros((blocks.shape[0], columns * num_blocks), np.float32)
    for i in range(num_blocks):
        whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = blocks[i * rows : (i + 1) * rows]
    return whole


def undo_pissa(trained: LowRank, weight: Array) -> LowRank:
    """PiSSA (Meng et al. 2024, arXiv:2404.02948) trains on W - s B0 A0, the largest singular values left out.

    Semantics: `W - s B0 A0 + s B A`. weight [d_out, d_in].
    """
    rank = trained.a.shape[0]
    u, s, vh = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank] / trained.scaling)
    return _without(trained, root[:, None] * vh[:rank], u[:, :rank] * root)


def undo_olora(trained: LowRank, stored: Array, *, transposed: bool) -> LowRank:
    """OLoRA (Büyükakyüz 2024, arXiv:2406.01775) trains on W - s Q R, by the weight as it is stored."""
    rank = trained.a.shape[0]
    q, r = np.linalg.qr(stored.astype(np.float64))
    a, b = r[:rank], q[:, :rank]
    return _without(trained, b.T, a.T) if transposed else _without(trained, a, b)


def _without(trained: LowRank, a0: Array64, b0: Array64) -> LowRank:
    """`B A - B0 A0` as `(B - B0) A + B0 (A - A0)`: training moves little, and nearly equal products would cancel."""
    sign = np.where(np.einsum("ij,ij->i", trained.a, a0) < 0, -1.0, 1.0)
    a0, b0 = a0 * sign[:, None], b0 * sign
    a = np.concatenate((trained.a, (trained.a - a0).astype(np.float32)))
    b = np.concatenate((trained.b - b0, b0), axis=1).astype(np.float32)
    return LowRank(a, b, trained.scaling)


def undo_kasa(trained: LowRank, diagonal: Array, weight: Array) -> LowRank:
    """KaSA (Wang et al. 2024, arXiv:2412.06071) drops the smallest singular values of W, as many as the rank.

    Semantics: `W - U_d S_d V_d + s B diag A`. weight [d_out, d_in].
    """
    rank = trained.a.shape[0]
    u, s, vh = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    kept = len(s) - rank
    adapted = scaled_by(trained, diagonal)
    b = np.concatenate((adapted.scaling * adapted.b, -u[:, kept:] * s[kept:]), axis=1).astype(np.float32)
    return LowRank(np.concatenate((adapted.a, vh[kept:].astype(np.float32))), b, 1.0)


def scaled_by(trained: LowRank, diagonal: Array) -> LowRank:
    """`B diag A`."""
    return LowRank(trained.a, trained.b * diagonal, trained.scaling)


def row_norms(weight: Array, delta: LowRank) -> Array:
    """‖weight + scaling b a‖ of each row, [d_out]; products in float32, sums in float64."""
    norms = np.empty(weight.shape[0], np.float32)
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    scaling = np.float32(delta.scaling)
    for start in range(0, len(norms), step):
        rows = (scaling * delta.b[start : start + step]) @ delta.a
        rows += weight[start : start + step]
        norms[start : start + step] = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return norms


def column_norms(table: Array, a: Array, b: Array) -> Array:
    """‖table + a b‖ of each column, [d]: table [rows, d], a [rows, rank], b [rank, d]."""
    squares = np.zeros(table.shape[1], np.float64)
    step = max(1, _CHUNK_ELEMENTS // table.shape[1])
    for start in range(0, len(table), step):
        rows = a[start : start + step] @ b
        rows += table[start : start + step]
        squares += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)
