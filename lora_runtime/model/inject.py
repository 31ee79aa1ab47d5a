"""Finding the base's linear projections, and wrapping them in place. Nothing is merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lora_runtime.batch import current_step
from lora_runtime.types import Site, SiteGroup


class LoraLinear(nn.Module):
    """A base projection that adds, per segment of the running step, the segment's own low-rank delta."""

    def __init__(self, base: nn.Linear, site: Site, group: SiteGroup) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.group = group

    @property
    def weight(self) -> torch.Tensor:
        """The base's own weight: some architectures read its dtype."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., T, d_in] → [..., T, d_out]."""
        y = self.base(x)
        step = current_step.get()
        if step is not None and (plan := step.token_plan).active(self.group):
            shrunk = step.shrink(x, self.group, plan)
            step.backend.expand(shrunk, self.site, plan, y.view(-1, y.shape[-1]))
        return y


@dataclass(frozen=True, slots=True)
class Calls:
    """The linear modules that ran in one forward, in order: (path, number of their input)."""

    per_token: tuple[tuple[str, int], ...]
    per_sequence: tuple[str, ...]


def observe_calls(backbone: nn.Module, num_tokens: int, forward: Callable[[], object]) -> Calls:
    """Run `forward` on one sequence of `num_tokens` and note which linears saw every token, and of which input."""
    seen: dict[str, int] = {}
    per_sequence: list[str] = []
    inputs: list[torch.Tensor] = []  # kept alive, so that `is` tells inputs apart

    def note(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            del module
            x = args[0]
            if x.dim() < 2 or x.shape[-2] != num_tokens:
                per_sequence.append(path)
            elif path not in seen:
                if not inputs or inputs[-1] is not x:
                    inputs.append(x)
                seen[path] = len(inputs) - 1

        return hook

    linears = [(path, module) for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(note(path)) for path, module in linears]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return Calls(tuple(seen.items()), tuple(dict.fromkeys(per_sequence)))


def make_sites(
    calls: Calls, backbone: nn.Module, sequence_linears: dict[str, nn.Linear]
) -> tuple[tuple[Site, ...], tuple[SiteGroup, ...]]:
    """Sites in call order, those that share an input in one group; then the sequence sites, a group each."""
    sites: list[Site] = []
    members: dict[int, list[Site]] = {}
    group_of_input: dict[int, int] = {}
    for path, number in calls.per_token:
        linear = backbone.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        group = group_of_input.setdefault(number, len(group_of_input))
        sites.append(Site(len(sites), path, linear.in_features, linear.out_features, group, per_sequence=False))
        members.setdefault(group, []).append(sites[-1])
    for path, linear in sequence_linears.items():
        group = len(members)
        sites.append(Site(len(sites), path, linear.in_features, linear.out_features, group, per_sequence=True))
        members[group] = [sites[-1]]
    groups = tuple(SiteGroup(index, found[0].d_in, tuple(found)) for index, found in sorted(members.items()))
    return tuple(sites), groups


def wrap_sites(backbone: nn.Module, sites: tuple[Site, ...], groups: tuple[SiteGroup, ...]) -> None:
    """Replace each token site's linear by a LoraLinear around it."""
    for site in sites:
        if site.per_sequence:
            continue
        parent, _, child = site.name.rpartition(".")
        linear = backbone.get_submodule(site.name)
        assert isinstance(linear, nn.Linear)
        setattr(backbone.get_submodule(parent), child, LoraLinear(linear, site, groups[site.group]))
