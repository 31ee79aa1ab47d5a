"""One adapter as one contiguous run: where each matrix goes, and writing it there.

Order: for each site group the A blocks of its sites, adjacent, so that one shrink serves the group; then the B of
each site, rank-major; then the head's parameters. Every block starts on the arena's alignment.
"""

from __future__ import annotations

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
        cursor = align(cursor + tensor.numel())
    return ImageLayout(cursor, tuple(sites), params)


def _place_group(present: list[SiteWeights], cursor: int, sites: list[SitePlacement]) -> int:
    a_offset, b_offset = cursor, align(cursor + sum(w.a.numel() for w in present))
    for w in present:
        sites.append(SitePlacement(w.site.index, a_offset, b_offset, w.rank, w.scaling))
        a_offset += w.a.numel()
        b_offset = align(b_offset + w.b.numel())
    return b_offset


def write_image(checkpoint: Checkpoint, layout: ImageLayout, run: torch.Tensor) -> None:
    """Copy a checkpoint into `run`, [num_elements] or longer, converting to its dtype."""
    weights = {w.site.index: w for w in checkpoint.sites}
    for place in layout.sites:
        w = weights[place.site]
        _block(run, place.a_offset, w.a.shape).copy_(w.a)
        _block(run, place.b_offset, w.b.T.shape).copy_(w.b.T)
    for name, (offset, shape) in layout.params.items():
        _block(run, offset, shape).copy_(checkpoint.params[name])


def head_views(layout: ImageLayout, run: torch.Tensor) -> dict[str, torch.Tensor]:
    """The head's parameters as views of a published run."""
    return {name: _block(run, offset, shape) for name, (offset, shape) in layout.params.items()}


def _block(run: torch.Tensor, offset: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    return run[offset : offset + torch.Size(shape).numel()].view(shape)
