"""Whether two ways to generate chose the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from server.bench.measure import OutputsDiffer

NEAR_TIE = 1e-3  # between the two best logits: rounding in fp32 may choose either


class Step(NamedTuple):
    """A token that a reference chose, and how nearly it chose another."""

    token: int
    second: int  # the next best
    gap: float  # between the logits of the two


def require_same(what: str, found: Sequence[Sequence[int]], wanted: Sequence[Sequence[Step]]) -> int:
    """The number of texts that part from the reference at a near tie; raises OutputsDiffer where it is none."""
    assert len(found) == len(wanted)
    return sum(_parts(f"{what}, text {i}", f, w) for i, (f, w) in enumerate(zip(found, wanted, strict=True)))


def require_different(what: str, found: Sequence[int], other: Sequence[int]) -> None:
    """Raise OutputsDiffer where an adapter changes nothing, as a comparison would prove nothing then."""
    if list(found) == list(other):
        raise OutputsDiffer(f"{what}: the text is the base's, so a wrong adapter would not be seen; nothing was timed")


def _parts(what: str, found: Sequence[int], wanted: Sequence[Step]) -> bool:
    if len(found) != len(wanted):
        raise OutputsDiffer(f"{what}: {len(found)} tokens instead of {len(wanted)}; nothing was timed")
    for at, (token, step) in enumerate(zip(found, wanted, strict=True)):
        if token == step.token:
            continue
        if token == step.second and step.gap <= NEAR_TIE:
            return True  # what follows has another beginning
        raise OutputsDiffer(
            f"{what}: token {at} is {token}, the reference's is {step.token}, {step.gap:.1e} before {step.second} "
            f"(a near tie is {NEAR_TIE:g}); nothing was timed"
        )
    return False
