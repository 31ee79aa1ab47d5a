"""What is measured, at two scales: `full` is what is committed, `small` shows in seconds that everything works."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("noisy", "shares", "overload", "cancels")
ADAPTER = "news"  # every tenant has one of this name, each with weights of its own

STEADY = ("steady-1", "steady-2", "steady-3", "steady-4")
NOISY = "noisy"  # without a limit of its own
LIMITED = "noisy-limited"  # as noisy, with few calls at once
WEIGHTS = {"weight-1": 1.0, "weight-2": 2.0, "weight-4": 4.0}
BOUNDED = ("bounded-1", "bounded-2", "bounded-3")  # their calls are cancelled; a leak would use up their limits
TENANTS = (*STEADY, NOISY, LIMITED, *WEIGHTS, *BOUNDED)

LIMITED_CALLS = 8
BOUNDED_SEQUENCES = 256  # as many as one call may have
STEADY_LOAD = 0.4  # of capacity, together
NOISY_RATE = 10  # times that of one steady tenant
OVERLOAD = 3  # times capacity
LIST_TEXTS = 8
DEADLINE_S = 2.0
SETTLE_S = 1.0  # until nothing may be held after the last cancelled call


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of one run; times in seconds."""

    num_texts: int  # different ones
    token_budgets: tuple[int, ...]  # the first is the server's default
    capacity_windows: int
    capacity_s: float
    in_flight: int  # texts, where a server is kept busy
    noisy_pairs: int
    noisy_window_s: float
    noisy_burst: int  # calls at once with which the noisy tenant begins
    lead_s: float  # before what counts: until queues are as long as they get
    shares_s: float
    overload_pairs: int
    closed_s: float
    open_s: float
    cancels: int  # and as many deadlines
    cancel_workers: int


SCALES = {
    "full": Scale(
        num_texts=64, token_budgets=(256, 512), capacity_windows=3, capacity_s=5.0, in_flight=192,
        noisy_pairs=5, noisy_window_s=5.0, noisy_burst=128, lead_s=2.2, shares_s=20.0, overload_pairs=3, closed_s=6.0,
        open_s=8.0, cancels=1000, cancel_workers=48,
    ),
    "small": Scale(
        num_texts=4, token_budgets=(256,), capacity_windows=1, capacity_s=1.0, in_flight=16, noisy_pairs=1,
        noisy_window_s=1.0, noisy_burst=8, lead_s=0.5, shares_s=1.0, overload_pairs=1, closed_s=1.0, open_s=1.5,
        cancels=30, cancel_workers=12,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TenantsBench:
    """One run."""

    base: str
    scale: Scale
    scale_name: str
    parts: tuple[str, ...] = PARTS
    threads: int = 2  # of the servers' forward passes
