"""What was found at each site, what is carried beside it, and what is not carried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_runtime.svd.spectrum import Spectrum

_CURVE_POINTS = 40


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One module that LoRA changes; the delta is the change that its factors stand for."""

    name: str  # its path in the task class
    shape: tuple[int, int]  # of its weight, as the model's file has it; of an adapter, of B A
    rank: int
    energy: float  # share of the delta's squared Frobenius norm that singular values of this rank keep
    error: float  # ‖delta − BA‖ / ‖delta‖, the rounding of A and B included
    norm: float  # ‖delta‖, Frobenius
    relative_change: float | None = None  # ‖delta‖ / ‖W‖; None where W is not at hand
    old_rank: int | None = None  # of an adapter that is compressed
    energy_at: Mapping[int, float] = field(default_factory=dict[int, float])  # rank → share, for a curve

    @property
    def kind(self) -> str:
        """The path below the layer's number: the same for all layers."""
        return kind_of_path(self.name)


@dataclass(frozen=True, slots=True)
class Carried:
    """One thing that is in the adapter beside LoRA."""

    name: str  # a module, or a parameter
    how: str
    relative_change: float | None = None  # ‖tuned − base‖ / ‖base‖; None where the base has none of it, or zeros


@dataclass(frozen=True, slots=True)
class NotCarried:
    """One change that the adapter does not have."""

    name: str
    reason: str
    relative_change: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """All sites together."""

    num_sites: int
    num_unchanged: int
    num_lora_parameters: int
    num_whole_parameters: int
    num_bytes: int  # of the adapter's weights
    energy: float  # share of all deltas' squared norms that the adapter keeps, rounding included
    error: float  # ‖deltas − BA‖ / ‖deltas‖ over all sites


def summarize(
    sites: tuple[SiteReport, ...], *, num_unchanged: int, num_parameters: int, num_whole_parameters: int, num_bytes: int
) -> Summary:
    """The sums and shares over all sites; `num_parameters` is all that the weights hold."""
    total = sum(site.norm**2 for site in sites)
    lost = sum((site.error * site.norm) ** 2 for site in sites)
    share = lost / total if total else 0.0
    num_lora = num_parameters - num_whole_parameters
    return Summary(len(sites), num_unchanged, num_lora, num_whole_parameters, num_bytes, 1 - share, share**0.5)


def energy_curve(spectrum: Spectrum, rank: int) -> dict[int, float]:
    """The share at ranks from 1 to all, evenly spaced on a logarithmic scale, `rank` among them."""
    most = len(spectrum.squares)
    spaced = {round(most ** (step / (_CURVE_POINTS - 1))) for step in range(_CURVE_POINTS)}
    return {point: spectrum.energy(point) for point in sorted(spaced | {rank})}


def kind_of_path(path: str) -> str:
    """What follows the last number of a path; the whole path where there is none."""
    pieces = path.split(".")
    last = max((place for place, piece in enumerate(pieces) if piece.isdigit()), default=-1)
    return ".".join(pieces[last + 1 :]) or path


def natural_order(path: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in path.split(".")]
