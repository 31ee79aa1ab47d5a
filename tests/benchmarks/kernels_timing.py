"""Seconds of contenders that take turns: by the clock on the CPU, by events on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from server.bench.measure import interleave

Run = Callable[[], object]
_COPY_BYTES = 1 << 30  # read by the bandwidth measurement, and as many written
_FLUSH_FACTOR = 2  # of the size of the L2 cache


@dataclass(frozen=True, slots=True)
class Timing:
    """How each contender is timed in each round."""

    rounds: int
    turn_seconds: float  # each turn has as many calls as fit in it, at least one: a short call cannot be timed alone
    cold_l2: bool = True  # on a GPU: the L2 cache is overwritten before each call


def time_contenders(runs: Mapping[str, Run], device: torch.device, timing: Timing) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure per round."""
    calls = {name: _calls_per_turn(run, device, timing.turn_seconds) for name, run in runs.items()}
    if device.type == "cuda":
        return _interleave_events(runs, calls, timing, device)
    turns = {name: _repeated(run, calls[name]) for name, run in runs.items()}
    found = interleave(turns, timing.rounds, lambda _: None)
    return {name: [seconds / calls[name] for seconds in of_rounds] for name, of_rounds in found.items()}


def copy_bytes_per_second(device: torch.device, repeats: int = 10) -> float:
    """Bytes read and written per second by a large copy: the bandwidth that can be had."""
    source = torch.zeros(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * _COPY_BYTES / min(seconds)


def _calls_per_turn(run: Run, device: torch.device, turn_seconds: float) -> int:
    run()
    started, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < turn_seconds / 2 and calls < 100:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
    return max(1, min(200, math.ceil(turn_seconds * calls / elapsed)))


def _repeated(run: Run, calls: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(calls):
            run()

    return turn


def _interleave_events(
    runs: Mapping[str, Run], calls: Mapping[str, int], timing: Timing, device: torch.device
) -> dict[str, list[float]]:
    """As `interleave`; the mean of a turn's calls, without what happens between them."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(_FLUSH_FACTOR * l2_bytes, dtype=torch.int8, device=device) if timing.cold_l2 else None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(timing.rounds + 1):
        for name, run in runs.items():
            found = event_seconds(run, calls[name], flushed)
            if turn:
                seconds[name].append(found)
    return seconds


def event_seconds(run: Run, calls: int, flushed: torch.Tensor | None) -> float:
    """Mean seconds of a call on the current CUDA stream; `flushed` is overwritten before each, and takes the cache."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, end in pairs:
        if flushed is not None:
            flushed.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3
