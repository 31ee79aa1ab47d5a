"""The slot table as the kernels read it: static tensors on the device, brought up to date between steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lora_runtime.arena import ALIGNMENT, ALayout, SlotTable
from lora_runtime.types import SiteGroup


class DeviceSlots:
    """A mirror of one `SlotTable`. All tensors have `capacity` rows, more than there are slots.

    Their addresses stay as they are, and a captured graph with them, until the table outgrows `capacity`; then
    `generation` grows, and graphs must be captured again.
    """

    def __init__(self, slots: SlotTable, device: torch.device, capacity: int | None = None) -> None:
        """`capacity`: of slots, at least as many as there are; None: twice as many."""
        assert slots.a_layout is ALayout.RANK_ROWS, f"the kernels read A as {ALayout.RANK_ROWS}"
        self._slots = slots
        self._device = device
        self._version = 0  # of the table, when it was last copied
        self.generation = 0
        self._allocate(max(capacity or 2 * slots.num_slots, slots.num_slots))
        self.refresh()

    @property
    def capacity(self) -> int:
        return self.rank.shape[0]

    @property
    def is_current(self) -> bool:
        """Whether `refresh` would change nothing."""
        return self._version == self._slots.version and self._slots.num_slots <= self.capacity

    def refresh(self) -> None:
        """Copy what changed in the table since the last time, in the order of the current stream, without a wait."""
        if self.is_current:
            return
        if self._slots.num_slots > self.capacity:
            self._allocate(2 * self._slots.num_slots)
            self.generation += 1
            self._version = 0
        changed = np.flatnonzero(self._slots.changed_at > self._version)
        for start, end in _runs(changed):
            self._copy(start, end)
        self._version = self._slots.version

    def _allocate(self, capacity: int) -> None:
        def zeros(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(capacity, width, dtype=dtype, device=self._device)

        num_groups, num_sites = len(self._slots.groups), self._slots.rank.shape[1]
        self.a_offset = zeros(num_groups, torch.int64)  # [capacity, group]: of the group's first A; all are adjacent
        self.group_rank = zeros(num_groups, torch.int32)  # [capacity, group]
        self.b_offset = zeros(num_sites, torch.int64)  # [capacity, site]
        self.column = zeros(num_sites, torch.int32)  # [capacity, site]: the site's first rank in its group's A
        self.rank = zeros(num_sites, torch.int32)  # [capacity, site]
        self.scaling = zeros(num_sites, torch.float32)  # [capacity, site]

    def _copy(self, start: int, end: int) -> None:
        rows = slice(start, end)
        slots = self._slots
        a_offset = torch.zeros(end - start, len(slots.groups), dtype=torch.int64)
        column = torch.zeros(end - start, slots.rank.shape[1], dtype=torch.int32)
        for group in slots.groups:
            a_offset[:, group.index] = _place_group(slots, rows, group, column)
        sources = {
            self.a_offset: a_offset,
            self.group_rank: torch.from_numpy(slots.group_rank[rows]),
            self.b_offset: slots.b_offset[rows],
            self.column: column,
            self.rank: slots.rank[rows],
            self.scaling: slots.scaling[rows],
        }
        for target, source in sources.items():
            if self._device.type == "cuda":
                source = source.pin_memory()  # a copy: the table may change while it travels
            target[rows].copy_(source, non_blocking=True)


def _place_group(slots: SlotTable, rows: slice, group: SiteGroup, column: torch.Tensor) -> torch.Tensor:
    """Where the group's A begins, [rows]; writes the first rank of each of its sites into `column`."""
    sites = torch.tensor([site.index for site in group.sites])
    ranks, offsets = slots.rank[rows][:, sites], slots.a_offset[rows][:, sites]  # [rows, sites of the group]
    columns = ranks.cumsum(1, dtype=torch.int32) - ranks
    present = ranks > 0
    start = torch.from_numpy(slots.group_a[rows, group.index])
    adjacent = offsets == start[:, None] + columns.long() * group.d_in
    assert bool((adjacent | ~present).all()), f"the A blocks of group {group.index} are not adjacent"
    aligned = (start % ALIGNMENT == 0) & ((slots.b_offset[rows][:, sites] % ALIGNMENT == 0) | ~present).all(1)
    assert bool(aligned.all()), f"a block of group {group.index} is not aligned"
    column[:, sites] = columns
    return start


def _runs(indices: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ascending indices as runs `start:end`."""
    for run in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1
