"""The op's signature: what every backend of `grouped_lora` takes and promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from lora_runtime.arena import BASE_SLOT, SlotTable
from lora_runtime.types import Site, SiteGroup


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `start:end` of a packed batch that belong to one slot."""

    slot: int
    start: int
    end: int
    generation: int

    @property
    def num_rows(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class LoraPlan:
    """Which rows belong to which slot, built once per step and shared by all layers and sites.

    Rows of the base are in no segment: they cost nothing and are not written. `cache` is the backend's own, per
    step: what it derives from the segments is derived once.
    """

    num_rows: int
    segments: tuple[Segment, ...]
    slots: SlotTable
    cache: dict[Any, Any] = field(default_factory=dict[Any, Any])

    @classmethod
    def build(cls, slots: SlotTable, rows: list[tuple[int, int]]) -> LoraPlan:
        """From (slot, number of rows) in batch order; neighbours of one slot merge, BASE_SLOT rows are left out."""
        segments: list[Segment] = []
        cursor = 0
        for slot, count in rows:
            if slot != BASE_SLOT and count:
                start = cursor
                if segments and segments[-1].slot == slot and segments[-1].end == cursor:
                    start = segments.pop().start
                segments.append(Segment(slot, start, cursor + count, int(slots.generation[slot])))
            cursor += count
        return cls(cursor, tuple(segments), slots)

    def active(self, group: SiteGroup) -> tuple[Segment, ...]:
        """The segments whose adapter has a matrix at some site of `group`."""
        key = "active", group.index
        if key not in self.cache:
            ranks = self.slots.group_rank
            self.cache[key] = tuple(s for s in self.segments if ranks[s.slot, group.index])
        return self.cache[key]

    def touches(self, group: SiteGroup) -> bool:
        """Whether any segment's adapter has a matrix at some site of `group`."""
        touched: Any = self.cache.get("touched")
        if touched is None:
            chosen = [segment.slot for segment in self.segments]
            touched = self.cache["touched"] = self.slots.group_rank[chosen].any(axis=0).tolist() if chosen else ()
        return bool(touched) and touched[group.index]

    def check_current(self) -> None:
        """Raise AssertionError when a slot was released since the plan was built."""
        for segment in self.segments:
            now = int(self.slots.generation[segment.slot])
            assert segment.generation == now, f"slot {segment.slot} is at generation {now}, not {segment.generation}"


class GroupedLora(Protocol):
    """A backend, bound to one arena. It is used from the engine thread alone.

    **Semantics**, for each segment (slot a, rows s:e) and each site of the group:
    `out[s:e] += scaling[a] * (x[s:e] @ A_a.T) @ B_a`, fp32 accumulation, a fixed order of reduction; rows in no
    segment keep their bits.
    """

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> Any:
        """`x [num_rows, d_in]` times every A of the group at once; the result is for `expand` of the same backend."""
        ...

    def expand(self, shrunk: Any, site: Site, plan: LoraPlan, out: torch.Tensor) -> None:
        """Add the deltas of one site into `out [num_rows, d_out]`, in place."""
        ...


@runtime_checkable
class GroupLora(GroupedLora, Protocol):
    """A backend that adds the deltas of all sites of a group at once, where their outputs lie side by side."""

    def expand_group(self, shrunk: Any, group: SiteGroup, plan: LoraPlan, out: torch.Tensor) -> None:
        """Add the deltas of every site into `out [num_rows, sum of d_out]`, in place, sites in the group's order."""
        ...


@runtime_checkable
class CompilingLora(GroupedLora, Protocol):
    """A backend that compiles kernels for shapes as it meets them."""

    @property
    def num_compiled(self) -> int:
        """Kernels compiled in this process."""
        ...

    def warm_up(self, groups: Iterable[SiteGroup], dtypes: Iterable[torch.dtype]) -> int:
        """Compile all that these groups can ever need for activations of these dtypes; how many kernels that were."""
        ...


def grouped_lora(
    backend: GroupedLora, x: torch.Tensor, group: SiteGroup, plan: LoraPlan, outs: Mapping[int, torch.Tensor]
) -> None:
    """One whole op: `outs` maps the index of each site of `group` to its output `[num_rows, d_out]`."""
    if not plan.active(group):
        return
    shrunk = backend.shrink(x, group, plan)
    for site in group.sites:
        backend.expand(shrunk, site, plan, outs[site.index])
