"""What is measured, at two scales: `full` is what is committed, `small` shows in seconds that everything works."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("many", "storm", "cold", "replace", "memory")
RANK = 8
TARGETS = ("query", "value")
NUM_LABELS = 4
TOLERANCE = 1e-4  # absolute, on logits in fp32


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of one run; times in seconds."""

    registered: int  # adapters under the root of `many`
    resident: int  # of them in memory
    asked: int  # of those, the ones that requests are for
    few: int  # adapters of the server that it is compared with
    num_weights: int  # different files of weights; the folders beyond that are hard links to them
    num_texts: int
    calls_in_flight: int
    calls_per_turn: int
    rounds: int
    list_calls: int
    starts: int
    storm_clients: int
    storm_resident: int
    storm_others: int
    storm_pairs: int
    window_s: float
    loads_per_s: float
    cold: int
    replace_clients: int
    moves: int
    move_interval_s: float
    churn_threads: int
    churn_operations: int


SCALES = {
    "full": Scale(
        registered=10_000, resident=1000, asked=200, few=10, num_weights=200, num_texts=8, calls_in_flight=64,
        calls_per_turn=384, rounds=15, list_calls=50, starts=3, storm_clients=16, storm_resident=8, storm_others=40,
        storm_pairs=6, window_s=10.0, loads_per_s=10.0, cold=50, replace_clients=64, moves=40, move_interval_s=1.0,
        churn_threads=32, churn_operations=128,
    ),
    "small": Scale(
        registered=60, resident=30, asked=12, few=4, num_weights=12, num_texts=4, calls_in_flight=16,
        calls_per_turn=48, rounds=2, list_calls=3, starts=1, storm_clients=4, storm_resident=3, storm_others=5,
        storm_pairs=2, window_s=1.0, loads_per_s=10.0, cold=4, replace_clients=8, moves=4, move_interval_s=0.4,
        churn_threads=4, churn_operations=16,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdaptersBench:
    """One run."""

    base: str
    scale: Scale
    scale_name: str
    parts: tuple[str, ...] = PARTS
    threads: int = 2  # of the servers' forward passes
