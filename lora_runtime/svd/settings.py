"""What an extraction or a compression is told, and what it tells meanwhile."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch

from lora_runtime.errors import InvalidRequest
from lora_runtime.svd.sites import SiteReport
from lora_runtime.svd.spectrum import Spectrum
from lora_runtime.types import Task


class FactorDtype(StrEnum):
    """Of A and B on disk; what is carried whole keeps its own."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        """The same for torch."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.value]


@dataclass(frozen=True, slots=True)
class RankRule:
    """The rank of each site: a number for all, or the least that keeps a share of the squared Frobenius norm."""

    rank: int | None = None
    energy: float | None = None  # in (0, 1]; 1 keeps every singular value above rounding
    max_rank: int | None = None  # no site gets more, whatever the energy

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise InvalidRequest("rank", "give either a rank or an energy, not both and not neither")
        for field, value in (("rank", self.rank), ("max_rank", self.max_rank)):
            if value is not None and value < 1:
                raise InvalidRequest(field, f"is {value}; it is 1 or more")
        if self.energy is not None and not (math.isfinite(self.energy) and 0 < self.energy <= 1):
            raise InvalidRequest("energy", f"is {self.energy:g}; it is a share above 0, and 1 at most")
        if self.rank is not None and self.max_rank is not None:
            raise InvalidRequest("max_rank", "limits what an energy asks for; a rank is its own limit")

    def choose(self, spectrum: Spectrum) -> int:
        """The rank of a site, at least 1."""
        if self.rank is not None:
            wanted = self.rank
        else:
            assert self.energy is not None
            wanted = spectrum.rank_for(self.energy)
        return max(1, min(wanted, spectrum.numerical_rank, self.max_rank or wanted))


@dataclass(frozen=True, slots=True)
class ExtractSettings:
    """One extraction."""

    base: Path  # folder of the model that the fine-tuning began from
    tuned: Path  # folder of the fine-tuned one
    out: Path
    ranks: RankRule
    targets: tuple[str, ...] | None = None  # endings of module paths that get LoRA; None: whatever has changed
    task: Task | None = None  # None: by the class of the fine-tuned model
    dtype: FactorDtype = FactorDtype.FLOAT32
    overwrite: bool = False
    threads: int | None = None  # of torch; None leaves its choice

    def __post_init__(self) -> None:
        if self.targets is not None and not self.targets:
            raise InvalidRequest("targets", "names nothing; write auto, or endings of module paths")
        _check_threads(self.threads)


@dataclass(frozen=True, slots=True)
class CompressSettings:
    """One compression. `dtype` None keeps that of each pair of factors."""

    adapter: Path
    out: Path
    ranks: RankRule
    dtype: FactorDtype | None = None
    overwrite: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_threads(self.threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise InvalidRequest("threads", f"is {threads}; it is 1 or more")


class SvdObserver(Protocol):
    """Told, in order: once how many matrices there are, then each of them when it is done."""

    def on_start(self, num_matrices: int) -> None:
        """Before the first."""
        ...

    def on_matrix(self, name: str, site: SiteReport | None) -> None:
        """One was looked at; `site` is None where nothing low-rank came of it."""
        ...


class SilentObserver:
    """Says nothing."""

    def on_start(self, num_matrices: int) -> None:
        """See `SvdObserver`."""

    def on_matrix(self, name: str, site: SiteReport | None) -> None:
        """See `SvdObserver`."""


@contextmanager
def torch_threads(threads: int | None) -> Generator[None]:
    """So many threads inside the block, the caller's number after it."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
