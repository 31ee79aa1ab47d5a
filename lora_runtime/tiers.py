"""One tier of memory for adapter images: a byte budget, who holds which run of it, and who goes when there is no room.

Evicted is the image with the least seconds of reload per byte and per use of others since its own last one: what was
used long ago, is large, or is quickly loaded again goes first (a cost-aware LRU; the function of hyperbolic caching,
Blankstein et al. 2017, over the time since the last use).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from lora_runtime.arena import RankArena, Run, align
from lora_runtime.types import AdapterId

_MAX_MOVED_BYTES = 64 << 20  # in one compaction: some 20 ms, between two steps


@dataclass(slots=True)
class _Holding:
    run: Run
    cost_s: float  # to bring it back
    used_at: int  # on the tier's clock, which counts uses


class Tier:
    """The images of one arena by adapter. `evict` and `moved` tell the owner what was done to make room."""

    def __init__(self, arena: RankArena) -> None:
        self.arena = arena
        self._holdings: dict[AdapterId, _Holding] = {}
        self._clock = 0

    def run_of(self, adapter: AdapterId) -> Run | None:
        holding = self._holdings.get(adapter)
        return None if holding is None else holding.run

    def holders(self) -> list[AdapterId]:
        """Adapters with a run, written or not."""
        return [*self._holdings]

    def bytes_of(self, adapter: AdapterId) -> int:
        run = self.run_of(adapter)
        return 0 if run is None else run.length * self.arena.buffer.itemsize

    def bytes_for(self, num_elements: int) -> int:
        """Bytes that an image of so many elements takes."""
        return align(max(num_elements, 1)) * self.arena.buffer.itemsize

    def used(self, adapter: AdapterId, cost_s: float | None = None) -> None:
        """Note a use; `cost_s` when it has been measured anew."""
        holding = self._holdings[adapter]
        if cost_s is not None:
            holding.cost_s = cost_s
        self._clock += 1
        holding.used_at = self._clock

    def can_ever_fit(self, num_elements: int, pinned: Collection[AdapterId]) -> bool:
        """Whether it fits once everything but `pinned` is gone, were what is pinned moved together."""
        held = sum(self._holdings[adapter].run.length for adapter in pinned if adapter in self._holdings)
        return align(num_elements) <= self.arena.buffer.numel() - held

    def allocate(
        self,
        adapter: AdapterId,
        num_elements: int,
        cost_s: float,
        *,
        idle: Callable[[], Iterable[AdapterId]],
        may_go: Callable[[AdapterId], bool],
        evict: Callable[[AdapterId], object],
        moved: Callable[[AdapterId], None],
    ) -> bool:
        """Take a run for an adapter, if need be by moving `idle` ones, or by evicting those of them that `may_go`.

        False when it cannot fit: nothing was evicted for it, unless a run that must stay lies in the way. `evict` must
        call `free` for the adapter it is given; `moved` is told after a run moved.
        """
        needed = align(max(num_elements, 1))
        if not self.arena.can_allocate(needed):
            movable = {*idle()}
            candidates = [other for other in movable if may_go(other)]
            gain = sum(self._holdings[other].run.length for other in candidates)
            if needed > self.arena.free_elements + gain:
                return False
            if not self._make_room(needed, movable, candidates, evict, moved):
                return False
        self._holdings[adapter] = _Holding(self.arena.allocate(needed), cost_s, 0)
        self.used(adapter)
        return True

    def _make_room(
        self,
        needed: int,
        movable: set[AdapterId],
        candidates: list[AdapterId],
        evict: Callable[[AdapterId], object],
        moved: Callable[[AdapterId], None],
    ) -> bool:
        candidates.sort(key=lambda other: (self.worth(other), other), reverse=True)
        while not self.arena.can_allocate(needed) and not self._compact(needed, movable, moved):
            if not candidates:
                return False  # what cannot be moved lies in the way
            victim = candidates.pop()
            movable.discard(victim)
            evict(victim)
            assert victim not in self._holdings, f"{victim} was evicted and still holds memory"
        return True

    def free(self, adapter: AdapterId) -> int:
        """Give back what an adapter holds; its bytes, 0 when it holds nothing."""
        holding = self._holdings.pop(adapter, None)
        if holding is None:
            return 0
        self.arena.free(holding.run)
        return holding.run.length * self.arena.buffer.itemsize

    def check_integrity(self) -> None:
        """Raise AssertionError unless the holdings are the arena's used runs."""
        self.arena.check_integrity()
        held = sum(holding.run.length for holding in self._holdings.values())
        assert held * self.arena.buffer.itemsize == self.arena.used_bytes, "the arena holds bytes of nobody"

    def worth(self, adapter: AdapterId) -> float:
        """Seconds of reload for each byte and use of others since its own last one; the least goes first."""
        holding = self._holdings[adapter]
        return holding.cost_s / (holding.run.length * (1 + self._clock - holding.used_at))

    def _compact(self, needed: int, movable: set[AdapterId], moved: Callable[[AdapterId], None]) -> bool:
        if self.arena.free_elements < needed:
            return False
        owners = {holding.run: adapter for adapter, holding in self._holdings.items()}
        fixed = {run for run, adapter in owners.items() if adapter not in movable}
        moves = self.arena.plan_compaction(needed, fixed)
        if moves is None or sum(run.length for run in moves) * self.arena.buffer.itemsize > _MAX_MOVED_BYTES:
            return False
        for run in moves:
            adapter = owners[run]
            self._holdings[adapter].run = self.arena.move_down(run)
            moved(adapter)
        return True
