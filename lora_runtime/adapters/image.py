"""One adapter as one contiguous run: where each matrix goes, and writing it there.

Order: for each site group the A of its sites as one matrix, so that one shrink serves the group, in the layout that
the backend reads fastest; then the B of each site, rank-major; then the head's parameters; then extras. Every block
starts on the arena's alignment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from lora_runtime.adapters.checkpoint import Checkpoint, SiteWeights
from lora_runtime.adapters.extras import IntArray, ModuleExtras
from lora_runtime.adapters.header import Array
from lora_runtime.arena import ALayout, SitePlacement, align
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import SiteGroup

_PIECE = 1 << 18  # elements rounded at a time
Place = tuple[int, tuple[int, ...]]  # (offset, shape)


@dataclass(frozen=True, slots=True)
class ExtrasLayout:
    """Where one module's extras lie; the ids of replaced rows are no floats and stay beside the image."""

    params: dict[str, Place]
    blocks: dict[str, Place]
    row_ids: IntArray | None = None


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Places in elements from the start of the image."""

    num_elements: int
    sites: tuple[SitePlacement, ...]
    params: dict[str, Place]  # of the head
    extras: dict[str, ExtrasLayout] = field(default_factory=dict[str, ExtrasLayout])  # by module path
    a_layout: ALayout = ALayout.RANK_COLUMNS


@dataclass(frozen=True, slots=True)
class ExtrasViews:
    """One module's extras in a published run: `params`, and the others by their names (row_ids too)."""

    params: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]


def plan_image(
    checkpoint: Checkpoint, groups: tuple[SiteGroup, ...], a_layout: ALayout = ALayout.RANK_COLUMNS
) -> ImageLayout:
    """Lay a checkpoint out; its size is its parameters plus at most one alignment per block."""
    weights = {w.site.index: w for w in checkpoint.sites}
    cursor = 0
    sites: list[SitePlacement] = []
    for group in groups:
        present = [weights[site.index] for site in group.sites if site.index in weights]
        cursor = _place_group(present, cursor, sites, a_layout)
    params, cursor = _place_all(checkpoint.params, cursor)
    extras: dict[str, ExtrasLayout] = {}
    for path, extra in checkpoint.extras.items():
        own, cursor = _place_all(extra.params, cursor)
        blocks, cursor = _place_all(extra.blocks, cursor)
        extras[path] = ExtrasLayout(own, blocks, extra.row_ids)
    return ImageLayout(cursor, tuple(sites), params, extras, a_layout)


def _place_group(present: list[SiteWeights], cursor: int, sites: list[SitePlacement], a_layout: ALayout) -> int:
    column, b_offset = 0, align(cursor + sum(w.a.size for w in present))
    for w in present:
        a_offset = cursor + a_layout.place(column, w.site.d_in)
        sites.append(SitePlacement(w.site.index, a_offset, b_offset, w.rank, w.scaling))
        column += w.rank
        b_offset = align(b_offset + w.b.size)
    return b_offset


def _place_all(arrays: dict[str, Array], cursor: int) -> tuple[dict[str, Place], int]:
    places: dict[str, Place] = {}
    for name, array in arrays.items():
        places[name] = cursor, tuple(array.shape)
        cursor = align(cursor + array.size)
    return places, cursor


def write_image(checkpoint: Checkpoint, layout: ImageLayout, run: torch.Tensor) -> None:
    """Copy a checkpoint into `run`, on the host, [num_elements] or longer; without an operation of torch.

    A run in float16 or bfloat16 gets the values rounded to the nearest. Raises AdapterRejected for a value that is
    beyond the range of the run's dtype.
    """
    if run.dtype is torch.float32:
        _write_image(checkpoint, layout, run.numpy())
        return
    exact = np.zeros(layout.num_elements, dtype=np.float32)
    _write_image(checkpoint, layout, exact)
    stored = run[: layout.num_elements].view(torch.int16).numpy()
    for start in range(0, len(exact), _PIECE):  # the rounding takes several times its input in memory
        piece = slice(start, start + _PIECE)
        stored[piece] = to_half(exact[piece], run.dtype)


def to_half(values: Array, dtype: torch.dtype) -> np.ndarray:
    """The bits, int16, of float32 values rounded to the nearest `dtype`, ties to even; values that are not finite stay
    so. Raises AdapterRejected for finite ones beyond its range.
    """
    assert dtype in (torch.float16, torch.bfloat16), f"{dtype} is no half precision"
    finite = np.isfinite(values)
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        bits, fits = half.view(np.int16), np.isfinite(half)
    else:
        wide = np.ascontiguousarray(values).view(np.uint32)
        rounded = (wide + (0x7FFF + ((wide >> 16) & 1))) >> 16
        bits = np.where(finite, rounded, (wide >> 16) | np.isnan(values)).astype(np.uint16).view(np.int16)
        fits = (bits & 0x7F80) != 0x7F80
    if not (fits | ~finite).all():
        largest = float(np.abs(values[finite]).max())
        message = f"a value of {largest:.3g} is beyond {str(dtype).removeprefix('torch.')}; serve with dtype float32"
        raise AdapterRejected("VALUE_OUT_OF_RANGE", "weights", message)
    return bits


def _write_image(checkpoint: Checkpoint, layout: ImageLayout, target: Array) -> None:
    weights = {w.site.index: w for w in checkpoint.sites}
    group_rank = Counter[int]()
    for w in checkpoint.sites:
        group_rank[w.site.group] += w.rank
    for place in layout.sites:
        w = weights[place.site]
        _write_strided(target, place.a_offset, w.a.T, layout.a_layout.strides(group_rank[w.site.group], w.site.d_in))
        _write(target, place.b_offset, w.b.T)
    for name, (offset, _) in layout.params.items():
        _write(target, offset, checkpoint.params[name])
    for offset, array in _extra_blocks(checkpoint.extras, layout):
        _write(target, offset, array)


def _extra_blocks(extras: dict[str, ModuleExtras], layout: ImageLayout) -> Iterator[tuple[int, Array]]:
    for path, places in layout.extras.items():
        for name, (offset, _) in places.params.items():
            yield offset, extras[path].params[name]
        blocks = extras[path].blocks
        for name, (offset, _) in places.blocks.items():
            yield offset, blocks[name]


def _write(target: Array, offset: int, array: Array) -> None:
    np.copyto(target[offset : offset + array.size].reshape(array.shape), array)


def _write_strided(target: Array, offset: int, array: Array, strides: tuple[int, int]) -> None:
    """`strides` in elements."""
    last = sum((size - 1) * stride for size, stride in zip(array.shape, strides, strict=True))
    part = target[offset : offset + last + 1]
    np.copyto(as_strided(part, array.shape, [stride * part.itemsize for stride in strides]), array)


def head_views(layout: ImageLayout, run: torch.Tensor) -> dict[str, torch.Tensor]:
    """The head's parameters as views of a published run."""
    return _views(layout.params, run)


def extras_views(layout: ImageLayout, run: torch.Tensor) -> dict[str, ExtrasViews]:
    """What each module changes beside LoRA, as views of a published run."""
    found: dict[str, ExtrasViews] = {}
    for path, places in layout.extras.items():
        tensors = _views(places.blocks, run)
        if places.row_ids is not None:
            tensors["row_ids"] = torch.from_numpy(places.row_ids).to(run.device)
        found[path] = ExtrasViews(_views(places.params, run), tensors)
    return found


def _views(places: dict[str, Place], run: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: run[offset : offset + math.prod(shape)].view(shape) for name, (offset, shape) in places.items()}
