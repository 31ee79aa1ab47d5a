"""One adapter as one contiguous run: where each matrix goes, and writing it there.

Order: for each site group the A blocks of its sites, adjacent, so that one shrink serves the group; then the B of
each site, rank-major; then the head's parameters. Every block starts on the arena's alignment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_runtime.adapters.checkpoint import Checkpoint, SiteWeights
from lora_runtime.arena import SitePlacement, align
from lora_runtime.types import SiteGroup


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Places in elements from the start of the image."""

    num_elements: int
    sites: tuple[SitePlacement, ...]
    params: dict[str, tuple[int, tuple[int, ...]]]  # head parameter → (offset, shape)


def plan_image(checkpoint: Checkpoint, groups: tuple[SiteGroup, ...]) -> ImageLayout:
    """Lay a checkpoint out; its size is its parameters plus at most one alignment per block."""
    weights = {w.site.index: w for w in checkpoint.sites}
    cursor = 0
    sites: list[SitePlacement] = []
    for group in groups:
        present = [weights[site.index] for site in group.sites if site.index in weights]
        cursor = _place_group(present, cursor, sites)
    params: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, tensor in checkpoint.params.items():
        params[name] = cursor, tuple(tensor.shape)
        cursor = align(cursor + tensor.size)
    return ImageLayout(cursor, tuple(sites), params)


def _place_group(present: list[SiteWeights], cursor: int, sites: list[SitePlacement]) -> int:
    a_offset, b_offset = cursor, align(cursor + sum(w.a.size for w in present))
    for w in present:
        sites.append(SitePlacement(w.site.index, a_offset, b_offset, w.rank, w.scaling))
        a_offset += w.a.size
        b_offset = align(b_offset + w.b.size)
    return b_offset


def write_image(checkpoint: Checkpoint, layout: ImageLayout, run: torch.Tensor) -> None:
    """Copy a checkpoint into `run`, float32 on the host, [num_elements] or longer; without an operation of torch."""
    target = run.numpy()
    weights = {w.site.index: w for w in checkpoint.sites}
    for place in layout.sites:
        w = weights[place.site]
        target[place.a_offset : place.a_offset + w.a.size] = w.a.reshape(-1)
        target[place.b_offset : place.b_offset + w.b.size] = w.b.T.reshape(-1)
    for name, (offset, _) in layout.params.items():
        target[offset : offset + checkpoint.params[name].size] = checkpoint.params[name].reshape(-1)


def head_views(layout: ImageLayout, run: torch.Tensor) -> dict[str, torch.Tensor]:
    """The head's parameters as views of a published run."""
    return {
        name: run[offset : offset + math.prod(shape)].view(shape) for name, (offset, shape) in layout.params.items()
    }
