"""The base's modules, wrapped in place: each adds, to the rows of an adapter, what that adapter changes. Nothing is
merged, and rows of no adapter keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lora_runtime.batch import Extras, current_step, scale_and_shift
from lora_runtime.types import Site, SiteGroup

Adapt = Callable[[torch.Tensor, torch.Tensor], bool]  # (input, outputs of a group side by side) → whether it did


class Wrapped(nn.Module):
    """A module of the base at `path` of the backbone; attributes it lacks are the base module's own."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__()
        self.base = base
        self.path = path

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # some architectures read a weight's dtype


class LoraLinear(Wrapped):
    """A base projection that adds, per segment of the running step, the segment's own low-rank delta."""

    def __init__(self, base: nn.Module, site: Site, group: SiteGroup) -> None:
        super().__init__(base, site.name)
        self.site = site
        self.group = group
        # what `base` does, faster; not always contiguous, and with its deltas where the group's were added at once
        self.prepacked: Callable[[torch.Tensor, Adapt], tuple[torch.Tensor, bool]] | None = None
        self.few_rows = 0  # up to which `base` is faster nevertheless

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., T, d_in] → [..., T, d_out]."""
        is_adapted = False
        step = current_step.get()
        if step is not None:
            step.begin_shrink(x, self.group)
        if self.prepacked is None or x.shape[:-1].numel() <= self.few_rows:
            y = self.base(x)
        else:
            y, is_adapted = self.prepacked(x, self._adapt_group)
        if step is None or is_adapted:
            return y
        owners = step.owners(x)
        rows = y.view(-1, y.shape[-1])
        extras = owners.extras(self.path)
        for start, end, extra in extras:
            if extra.params:
                rows[start:end] = functional_call(self.base, dict(extra.params), x.reshape(-1, x.shape[-1])[start:end])
        if owners.plan.touches(self.group):
            shrunk = step.shrink(x, self.group, owners.plan)
            step.backend.expand(shrunk, self.site, owners.plan, rows)
        scale_and_shift(rows, extras)
        return y

    def _adapt_group(self, x: torch.Tensor, whole: torch.Tensor) -> bool:
        """Add the deltas of all projections of the group, whose outputs lie side by side; False where each adds its
        own, as when an adapter changes more of one than LoRA does.
        """
        step = current_step.get()
        if step is None or step.group_backend is None:
            return False
        owners = step.owners(x)
        if any(owners.extras(site.name) for site in self.group.sites):
            return False
        if owners.plan.touches(self.group):
            shrunk = step.shrink(x, self.group, owners.plan)
            step.group_backend.expand_group(shrunk, self.group, owners.plan, whole.view(-1, whole.shape[-1]))
        return True


class AdaptedLeaf(Wrapped):
    """A norm, or another module that computes each token by itself: it runs again with an adapter's parameters."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base(x, *args, **kwargs)
        step = current_step.get()
        if step is None or not (extras := (owners := step.owners(x)).extras(self.path)):
            return y
        inputs, rows = owners.rows(x), owners.rows(y)
        for start, end, extra in extras:
            rows[start:end] = functional_call(self.base, dict(extra.params), (inputs[start:end], *args), kwargs)
        return y


class AdaptedEmbedding(Wrapped):
    """An embedding with, per adapter, replaced rows, a low-rank delta, or another table."""

    def __init__(self, base: nn.Embedding, path: str) -> None:
        super().__init__(base, path)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [..., T] → [..., T, d]."""
        step = current_step.get()
        if step is None or not (extras := step.owners(ids).extras(self.path)):
            return self.base(ids)
        flat = ids.reshape(-1)
        y = self.base(self._in_base(flat, extras).view(ids.shape))
        rows = y.view(-1, y.shape[-1])
        for start, end, extra in extras:
            self._adapt(flat[start:end], rows[start:end], extra)
        return y

    def _in_base(self, flat: torch.Tensor, extras: Sequence[tuple[int, int, Extras]]) -> torch.Tensor:
        """The ids, 0 for those whose rows an adapter brings: its table may be longer than the base's."""
        known = flat.clone()
        for start, end, extra in extras:
            if extra.params:
                known[start:end] = 0
            elif extra.row_ids is not None:
                known[start:end].masked_fill_(_find(flat[start:end], extra.row_ids)[1], 0)
        return known

    def _adapt(self, ids: torch.Tensor, rows: torch.Tensor, extra: Extras) -> None:
        if extra.params:
            rows.copy_(functional_call(self.base, dict(extra.params), ids))
        if extra.row_ids is not None:
            assert extra.rows is not None
            place, listed = _find(ids, extra.row_ids)
            rows[listed] = extra.rows[place[listed]]
        if extra.embed_a is not None:
            assert extra.embed_b is not None
            rows.addmm_(F.embedding(ids, extra.embed_a), extra.embed_b)
        if extra.gain is not None:
            rows.mul_(extra.gain)


def _find(ids: torch.Tensor, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(place among `row_ids`, whether it is there) of each id."""
    place = torch.searchsorted(row_ids, ids).clamp_(max=len(row_ids) - 1)
    return place, row_ids[place] == ids
