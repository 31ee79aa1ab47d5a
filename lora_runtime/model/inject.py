"""Sites and leaves of an observed base, and wrapping them in place. Nothing is merged."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_runtime.adapters.base_spec import Leaf, LeafKind
from lora_runtime.model.observe import Observed, Rows, kind_of, widths
from lora_runtime.model.wrapped import AdaptedEmbedding, AdaptedLeaf, LoraLinear
from lora_runtime.types import Site, SiteGroup


def make_sites(
    observed: dict[str, Observed], sequence_linears: dict[str, nn.Module]
) -> tuple[tuple[Site, ...], tuple[SiteGroup, ...]]:
    """Sites in call order, those that share an input in one group; then the sequence sites, a group each."""
    sites: list[Site] = []
    members: dict[int, list[Site]] = {}
    group_of_input: dict[int | str, int] = {}
    for path, leaf in observed.items():
        if leaf.kind is LeafKind.LINEAR and leaf.per_token:
            source = path if leaf.number is None else leaf.number
            group = group_of_input.setdefault(source, len(group_of_input))
            sites.append(Site(len(sites), path, *widths(leaf.module), group, per_sequence=False))
            members.setdefault(group, []).append(sites[-1])
    for path, linear in sequence_linears.items():
        group = len(members)
        sites.append(Site(len(sites), path, *widths(linear), group, per_sequence=True))
        members[group] = [sites[-1]]
    groups = tuple(SiteGroup(index, found[0].d_in, tuple(found)) for index, found in sorted(members.items()))
    return tuple(sites), groups


def make_leaves(observed: dict[str, Observed], sequence_leaves: dict[str, nn.Module], packed: bool) -> dict[str, Leaf]:
    """What adapters may change, in the token path and in the head stage.

    Where sequences are packed, a module that sees no row per token is none of it.
    """
    leaves = {
        path: make_leaf(path, leaf.module, per_sequence=not leaf.per_token)  # a pooler, even if no task's head has it
        for path, leaf in observed.items()
        if not (packed and Rows.SHARED in leaf.rows)
    }
    return leaves | {path: make_leaf(path, module, per_sequence=True) for path, module in sequence_leaves.items()}


def make_leaf(path: str, module: nn.Module, *, per_sequence: bool = False) -> Leaf:
    """A module as an adapter's checkpoint knows it."""
    scale = getattr(module, "embed_scale", None)
    return Leaf(
        path=path,
        kind=kind_of(module),
        shapes={name: tuple(value.shape) for name, value in module.named_parameters()},
        transposed=isinstance(module, Conv1D),
        embed_scale=1.0 if scale is None else float(scale),
        per_sequence=per_sequence,
    )


def shared_modules(observed: dict[str, Observed]) -> frozenset[str]:
    """Paths of modules that the base runs once for all sequences of a batch."""
    return frozenset(path for path, leaf in observed.items() if Rows.SHARED in leaf.rows)


def wrap_leaves(
    backbone: nn.Module, observed: dict[str, Observed], sites: tuple[Site, ...], groups: tuple[SiteGroup, ...]
) -> None:
    """Replace each leaf that runs per token by its wrapper."""
    site_at = {site.name: site for site in sites if not site.per_sequence}
    for path, leaf in observed.items():
        if not leaf.per_token:
            continue
        parent, _, child = path.rpartition(".")
        setattr(backbone.get_submodule(parent), child, _wrapper(path, leaf, site_at, groups))


def _wrapper(path: str, leaf: Observed, site_at: dict[str, Site], groups: tuple[SiteGroup, ...]) -> nn.Module:
    if leaf.kind is LeafKind.LINEAR:
        return LoraLinear(leaf.module, site_at[path], groups[site_at[path].group])
    if leaf.kind is LeafKind.EMBEDDING:
        assert isinstance(leaf.module, nn.Embedding)
        return AdaptedEmbedding(leaf.module, path)
    return AdaptedLeaf(leaf.module, path)
