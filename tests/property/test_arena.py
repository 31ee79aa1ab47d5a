"""Any order of allocations, publications and frees leaves arena and slot table whole."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_runtime.arena import RankArena, Run, SitePlacement, SlotTable, align
from lora_runtime.errors import CapacityExceeded
from lora_runtime.types import Site, SiteGroup

SITE = Site(0, "q", 16, 16, 0, per_sequence=False)
GROUPS = (SiteGroup(0, 16, (SITE,)),)


class ArenaMachine(RuleBasedStateMachine):
    """Fills each run with its own number and checks that no other run's write changed it."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = RankArena(64 * 100)
        self.slots = SlotTable(1, GROUPS, num_slots=2)
        self.held: dict[int, tuple[Run, int, int]] = {}  # slot → (run, number, generation)
        self.seen: set[tuple[int, int]] = set()
        self.count = 0

    @rule(num_elements=st.integers(1, 600))
    def load(self, num_elements: int) -> None:
        if not self.arena.can_allocate(num_elements):
            free = self.arena.num_bytes - self.arena.used_bytes
            try:
                self.arena.allocate(num_elements)
            except CapacityExceeded as error:
                assert "unload adapters" in error.message  # noqa: PT017
                assert not self.held or free < self.arena.num_bytes
                return
            raise AssertionError("allocated what did not fit")
        run = self.arena.allocate(num_elements)
        self.count += 1
        self.arena.view(run).fill_(self.count)
        slot = self.slots.acquire()
        stay = slot, int(self.slots.generation[slot])
        assert stay not in self.seen, "a slot and generation named two adapters"
        self.seen.add(stay)
        self.slots.publish(slot, run, (SitePlacement(0, 0, 16, 1, 2.0),))
        self.held[slot] = run, self.count, stay[1]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        run, _, _ = self.held.pop(slot)
        self.slots.release(slot)
        self.arena.view(run).fill_(float("nan"))
        self.arena.free(run)

    @rule(num_elements=st.integers(1, 900), data=st.data())
    def compact(self, num_elements: int, data: st.DataObject) -> None:
        fixed_slots = data.draw(st.sets(st.sampled_from(sorted(self.held)))) if self.held else set[int]()
        fixed = {self.held[slot][0] for slot in fixed_slots}
        moves = self.arena.plan_compaction(num_elements, fixed)
        if moves is None:
            if not fixed:
                assert self.arena.free_elements < align(num_elements), "there was room, and everything could move"
            return
        assert not fixed & set(moves)
        slot_of = {run: slot for slot, (run, _, _) in self.held.items()}
        for run in moves:
            moved = self.arena.move_down(run)
            if moved != run:
                slot = slot_of[run]
                self.slots.move(slot, moved)
                self.held[slot] = moved, self.held[slot][1], self.held[slot][2] + 1
                self.seen.add((slot, self.held[slot][2]))
        assert self.arena.can_allocate(num_elements), "the moves made no room"

    @invariant()
    def whole(self) -> None:
        self.arena.check_integrity()
        self.slots.check_integrity()
        for slot, (run, number, generation) in self.held.items():
            assert torch.all(self.arena.view(run) == number)
            assert self.slots.entry(slot, 0) == (run.offset, run.offset + 16, 1, 2.0)
            assert self.slots.generation[slot] == generation
        total = sum(run.length for run, _, _ in self.held.values()) * 4
        assert self.arena.used_bytes == total

    def teardown(self) -> None:
        for run, _, _ in self.held.values():
            self.arena.free(run)
        assert self.arena.can_allocate(self.arena.buffer.numel()), "freed runs did not coalesce"


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
