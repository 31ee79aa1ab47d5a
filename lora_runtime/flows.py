"""What the scheduler keeps of those that wait, and of a batch as it is put together. No torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lora_runtime.continuation import Continuation
from lora_runtime.tickets import Ticket, Work
from lora_runtime.types import AdapterId


@dataclass(slots=True, eq=False)
class Flow:
    """Tickets of one tenant, adapter and priority with sequences left, by arrival."""

    tenant: str
    adapter: AdapterId
    priority: int
    served: float = 0.0  # tokens over weight
    queue: deque[Ticket] = field(default_factory=deque[Ticket])

    @property
    def key(self) -> tuple[AdapterId, int]:
        return self.adapter, self.priority

    @property
    def rank(self) -> tuple[float, int]:
        return self.served, self.queue[0].arrival


@dataclass(slots=True, eq=False)
class TenantFlows:
    """What one tenant was served, and its flows."""

    served: float = 0.0  # tokens over weight
    flows: dict[tuple[AdapterId, int], Flow] = field(default_factory=dict[tuple[AdapterId, int], Flow])
    flow_floor: float = 0.0  # where a flow that comes back begins
    waiting: frozenset[tuple[AdapterId, int]] = frozenset()  # flows that could be served in the last batch


@dataclass(slots=True, eq=False)
class Draft:
    """A batch as it is put together."""

    chosen: list[Work]
    is_ready: Callable[[AdapterId], bool]
    budget: int  # tokens beside those of the sequences that generate
    num_taken: int = 0  # of these
    may_begin: bool = True  # whether no prompt waits for room in the KV cache
    waits_for_room: bool = False  # whether the flow looked at last has nothing but such a prompt
    chunks: dict[Continuation, Work] = field(default_factory=dict[Continuation, Work])

    @property
    def room(self) -> int:
        return self.budget - self.num_taken
