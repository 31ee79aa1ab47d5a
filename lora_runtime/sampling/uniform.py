"""One random number per sequence and step, from a hash of its seed: no state, so no order and no batch matters."""

from __future__ import annotations

from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(words: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014; Stafford's variant 13)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def uniforms(seeds: Words, steps: Words) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers in [0, 1), multiples of 2**-53: `mix(mix(seed + gamma) + (step + 1) * gamma)`. [rows], [rows] → [rows]

    Each seed is its own SplitMix64 stream, started at a mixed place so that near seeds do not share a stretch.
    """
    words = _mix(_mix(seeds + _GAMMA) + (steps + np.uint64(1)) * _GAMMA)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request that asks for several; the first sample's is the request's own."""
    if index == 0:
        return seed
    word = _mix(np.array([seed], np.uint64) + np.array([index], np.uint64) * np.uint64(0xD1342543DE82EF95))
    return int(word[0] >> np.uint64(1))
