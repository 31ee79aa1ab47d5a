"""Reading an adapter's values after its plan: every tensor is understood and right, or the adapter is refused.

Everything here is numpy, not torch: a torch operation large enough to be split would start a second team of OpenMP
threads in the loader, and from then on every small operation of the engine is about five times slower (measured: a
fifth of the throughput with 64 adapters on two cores).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.extras import ModuleExtras, make_extras
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.folder import AdapterFolder
from lora_runtime.adapters.header import Array, TensorRef, header_of, read_tensor, rounded_to
from lora_runtime.adapters.keys import Part
from lora_runtime.adapters.low_rank import LowRank, dense, scaled_by, undo_kasa, undo_olora, undo_pissa
from lora_runtime.adapters.metadata import METADATA_FILE, AdapterMetadata
from lora_runtime.adapters.modules import ModulePlan
from lora_runtime.adapters.plan import AdapterPlan, plan_adapter
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterCard, Site

logger = logging.getLogger(__name__)

_CHUNK_ROWS = 4096
_MAX_STORED_RATIO = 3  # of bytes in the files to those in the arena: float64 is twice as long, and some are not used


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """One site's pair: a [rank, d_in], b [d_out, rank]."""

    site: Site
    a: Array
    b: Array
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated adapter in host memory."""

    card: AdapterCard
    digest: str
    sites: tuple[SiteWeights, ...]  # by site index
    params: dict[str, Array]  # head parameters that the adapter brings, by name
    extras: dict[str, ModuleExtras] = field(default_factory=dict[str, ModuleExtras])  # by module path

    @property
    def num_parameters(self) -> int:
        lora = sum(w.a.size + w.b.size for w in self.sites)
        return lora + sum(p.size for p in self.params.values()) + sum(e.size for e in self.extras.values())


def read_checkpoint(folder: Path, base: BaseSpec, max_bytes: int) -> Checkpoint:
    """Read and validate a PEFT folder against the served base; its image must fit `max_bytes`.

    The digest is of the very bytes that are parsed. Raises AdapterRejected, naming file, tensor or field.
    """
    plan = plan_adapter(folder, base, Findings())
    assert plan is not None
    return read_planned(plan, base, max_bytes)


def read_planned(plan: AdapterPlan, base: BaseSpec, max_bytes: int) -> Checkpoint:
    """As `read_checkpoint`, of a folder that is planned."""
    assert plan.card is not None
    _check_size(plan, max(plan.num_bytes, plan.num_stored_bytes // _MAX_STORED_RATIO), max_bytes)
    files = {name: plan.folder.read_weights(name) for name in plan.folder.weights}
    _check_planned(plan, files)
    _check_digests(plan.metadata, plan.folder)
    reader = _Reader(plan, base, files)
    params = {name: reader.read(ref) for name, ref in plan.head.items()}
    sites: list[SiteWeights] = []
    extras: dict[str, ModuleExtras] = {}
    for module in plan.modules:
        low_rank, extra = reader.module(module)
        if low_rank is not None and module.site is not None:
            sites.append(SiteWeights(module.site, low_rank.a, low_rank.b, low_rank.scaling))
        if extra is not None:
            extras[module.name] = extra
    sites.sort(key=lambda weights: weights.site.index)
    checkpoint = Checkpoint(plan.card, plan.folder.digest, tuple(sites), params, extras)
    _check_size(plan, 4 * checkpoint.num_parameters, max_bytes)
    return checkpoint


def _check_size(plan: AdapterPlan, num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        message = f"needs {num_bytes} bytes of the arena, which has {max_bytes}; give it more"
        raise AdapterRejected("TOO_LARGE", ", ".join(plan.folder.weights), message)


def _check_planned(plan: AdapterPlan, files: dict[str, bytearray]) -> None:
    """Raise AdapterRejected unless the tensors lie where the plan, made from an earlier look, says."""
    for name, data in files.items():
        if set(header_of(data, name).values()) != {ref for ref in plan.tensors if ref.file == name}:
            raise AdapterRejected("WEIGHTS_CORRUPT", name, "changed while it was read; load it again")


def _check_digests(metadata: AdapterMetadata | None, folder: AdapterFolder) -> None:
    for name, promised in (metadata.digests if metadata else {}).items():
        found = folder.sha256(name)
        if found != promised:
            shown = found[:12] if found else "no such file"
            message = f"its SHA-256 is not the one in {METADATA_FILE} ({shown} ≠ {promised[:12]})"
            raise AdapterRejected("DIGEST_MISMATCH", name, message)


class _Reader:
    """Turns the tensors of a plan into arrays."""

    def __init__(self, plan: AdapterPlan, base: BaseSpec, files: dict[str, bytearray]) -> None:
        self._plan = plan
        self._base = base
        self._files = files

    def read(self, ref: TensorRef) -> Array:
        return read_tensor(ref, self._files[ref.file])

    def module(self, plan: ModulePlan) -> tuple[LowRank | None, ModuleExtras | None]:
        """What a module adds and what it changes beside that."""
        low_rank = self._low_rank(plan) if plan.site is not None else None
        if not plan.extras:
            return low_rank, None
        copy = None if plan.copy is None else self._copy(plan, plan.copy)
        return low_rank, make_extras(plan, low_rank, copy, self._base, self.read)

    def _low_rank(self, plan: ModulePlan) -> LowRank:
        a, b = self.read(plan.parts[Part.A]), self.read(plan.parts[Part.B])
        trained = LowRank(dense(a, plan.blocks[0]), dense(b, plan.blocks[1]), plan.scaling)
        if Part.DIAGONAL in plan.parts:
            diagonal = self.read(plan.parts[Part.DIAGONAL])
            if not plan.residual:
                return scaled_by(trained, diagonal)
            return self._finite(plan, undo_kasa(trained, diagonal, self._base.weight(plan.name)))
        return self._finite(plan, self._undone(plan, trained)) if plan.residual else trained

    def _undone(self, plan: ModulePlan, trained: LowRank) -> LowRank:
        if self._plan.config.init == "pissa":
            return undo_pissa(trained, self._base.weight(plan.name))
        assert plan.leaf is not None
        stored = self._base.parameters[f"{plan.name}.weight"]
        return undo_olora(trained, stored, transposed=plan.leaf.transposed)

    def _finite(self, plan: ModulePlan, low_rank: LowRank) -> LowRank:
        if not (np.isfinite(low_rank.a).all() and np.isfinite(low_rank.b).all()):
            ref = plan.parts[Part.A]
            ref.refuse("NOT_FINITE", "has no finite counterpart: what the initialisation took from the base overflows")
        return low_rank

    def _copy(self, plan: ModulePlan, ref: TensorRef) -> Array | None:
        """A weight saved beside the adapter, None where it is the base's own, up to the rounding of its dtype."""
        copy = self.read(ref)
        own = self._base.parameters[f"{plan.name}.weight"]
        if _is_same(copy, own, ref.dtype):
            return None
        if copy.shape == own.shape:
            logger.warning("%s is not the base's own and is served in its place", ref.where)
        return copy


def _is_same(copy: Array, own: Array, dtype: str) -> bool:
    if copy.shape != own.shape:
        return False
    steps = range(0, len(own), _CHUNK_ROWS)
    return all(np.array_equal(copy[i : i + _CHUNK_ROWS], rounded_to(own[i : i + _CHUNK_ROWS], dtype)) for i in steps)
