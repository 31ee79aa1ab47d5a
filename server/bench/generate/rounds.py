"""Contenders that tell figures, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from server.bench.measure import Spread

Figures = dict[str, float]
Turn = Callable[[], Figures]


def take_turns(turns: Sequence[Turn], rounds: int, on_round: Callable[[int], None]) -> dict[str, list[float]]:
    """Each figure in each round, after one uncounted turn of each contender."""
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for turn in turns:
            figures = turn()
            if number:
                for name, value in figures.items():
                    found.setdefault(name, []).append(value)
        on_round(number)
    return found


def speed(name: str, num_tokens: int, run: Callable[[], object]) -> Turn:
    """A turn that tells tokens per second, those of the prompts not counted."""

    def turn() -> Figures:
        started = time.perf_counter()
        run()
        return {name: num_tokens / (time.perf_counter() - started)}

    return turn


def quotient(found: Mapping[str, Sequence[float]], above: str, below: str) -> Spread:
    """One figure over another, round by round."""
    return Spread.of([a / b for a, b in zip(found[above], found[below], strict=True)])
