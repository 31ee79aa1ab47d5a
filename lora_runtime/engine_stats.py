"""What waits and runs in an engine, as others may read it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_runtime.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Read from any thread, so its numbers may be a step apart."""

    turned_at: float  # monotonic seconds, when the loop last began a turn
    num_waiting: int = 0  # requests that no batch has carried yet
    num_running: int = 0  # requests that have begun and have no reply
    num_queued_sequences: int = 0  # that wait for a step
    num_queued_tokens: int = 0  # of those sequences


def engine_stats(scheduler: Scheduler, turned_at: float) -> EngineStats:
    """Looks at each open request once; asks the engine's thread for nothing, so that it answers for a stalled one."""
    tickets = scheduler.open_tickets()
    num_running = sum(ticket.started_at is not None for ticket in tickets)
    num_queued = sum(ticket.num_left for ticket in tickets)
    return EngineStats(turned_at, len(tickets) - num_running, num_running, num_queued, scheduler.num_queued_tokens)
