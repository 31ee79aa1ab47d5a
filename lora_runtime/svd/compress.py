"""An adapter of a lower rank, from the singular values of B·A: no matrix of the base's size is formed.

With thin QR decompositions `B = Q_b R_b` and `A^T = Q_a R_a`, `s B A = Q_b (s R_b R_a^T) Q_a^T`: the singular values of
the product are those of the small core, and so is the best approximation of each rank (Eckart and Young 1936).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.folder import INDEX_FILE, PICKLE_FILES, SHARDS, WEIGHTS_FILE
from lora_runtime.adapters.header import TensorRef
from lora_runtime.adapters.keys import Part
from lora_runtime.adapters.metadata import METADATA_FILE
from lora_runtime.adapters.plan import AdapterPlan, ModulePlan, plan_adapter
from lora_runtime.adapters.pooling import POOLING_FILE
from lora_runtime.adapters.variants import BD_LORA, DORA, KASA, RECOMPUTED, Variant
from lora_runtime.adapters.writing import staged_folder, write_config, write_metadata
from lora_runtime.errors import AdapterRejected
from lora_runtime.svd.layout import rank_fields
from lora_runtime.svd.settings import CompressSettings, SilentObserver, SvdObserver, torch_threads
from lora_runtime.svd.sites import SiteReport, Summary, energy_curve, natural_order, summarize
from lora_runtime.svd.spectrum import Spectrum, check_finite, decompose_core
from lora_runtime.svd.writer import TensorWriter

_REFUSED: tuple[tuple[Variant, str], ...] = (
    (DORA, "its magnitudes divide by the norm of W + BA, so BA is not the whole change"),
    (RECOMPUTED, "it was trained on what an SVD or QR left of the base, so its change is BA less what was taken away"),
    (KASA, "a diagonal lies between B and A, and part of the base was taken away"),
    (BD_LORA, "its A or B is block-diagonal, which no factor of a lower rank is"),
)
_WEIGHTS = (WEIGHTS_FILE, SHARDS, INDEX_FILE, PICKLE_FILES)
_STATE_OF_TRAINING = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.safetensors")


@dataclass(frozen=True, slots=True)
class CompressReport:
    """What each site lost."""

    out: Path
    sites: tuple[SiteReport, ...]  # those that are compressed and those that stay, by path and layer
    num_old_bytes: int  # of the weights as they were
    notes: tuple[str, ...]
    summary: Summary
    seconds: float


def compress_adapter(settings: CompressSettings, observer: SvdObserver | None = None) -> CompressReport:
    """Write an adapter whose every site has the rank that `settings.ranks` says, or its own where that is no higher.

    PEFT gives the same change up to what was cut off: a compressed site has a scaling of exactly 1, the others keep
    theirs. Everything else of the folder goes along unchanged, but for `metrics`, which were measured on the original.

    Raises AdapterRejected for an adapter that is damaged, or whose change is more than BA; InvalidRequest for
    settings. The folder appears complete, or not at all.
    """
    started = time.monotonic()
    with staged_folder(settings.out, overwrite=settings.overwrite) as folder, torch_threads(settings.threads):
        findings = Findings()
        plan = plan_adapter(settings.adapter, None, findings)
        assert plan is not None
        _check_variants(plan)
        run = _Compression(settings, plan, TensorWriter(folder / WEIGHTS_FILE))
        run.all(observer or SilentObserver())
        num_bytes = run.writer.close()
        raw: dict[str, Any] = plan.folder.read_object(CONFIG_FILE) or {}
        write_config(folder, raw | rank_fields(run.ranks, run.alphas))
        _copy_beside(plan, folder)
        if plan.metadata is not None:
            metrics = {} if run.num_compressed else plan.metadata.metrics
            write_metadata(folder, plan.metadata.model_copy(update={"metrics": metrics}))
    sites = tuple(run.sites)
    rest = run.writer.num_parameters - sum(site.rank * sum(site.shape) for site in sites)
    return CompressReport(
        settings.out,
        sites,
        sum((plan.folder.home / name).stat().st_size for name in plan.folder.weights),
        tuple(findings.warnings),
        summarize(
            sites,
            num_unchanged=len(sites) - run.num_compressed,
            num_parameters=run.writer.num_parameters,
            num_whole_parameters=rest,
            num_bytes=num_bytes,
        ),
        time.monotonic() - started,
    )


def _check_variants(plan: AdapterPlan) -> None:
    for variant, reason in _REFUSED:
        if variant in plan.variants:
            where = f"{CONFIG_FILE} field {variant.field}"
            raise AdapterRejected("FEATURE_UNSUPPORTED", where, f"{variant.name} cannot be compressed: {reason}")


@dataclass(slots=True)
class _Compression:
    """One run: reads a site, writes what becomes of it, and keeps the findings alone."""

    settings: CompressSettings
    plan: AdapterPlan
    writer: TensorWriter
    sites: list[SiteReport] = field(default_factory=list[SiteReport])
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    alphas: dict[str, float] = field(default_factory=dict[str, float])
    num_compressed: int = 0

    def all(self, observer: SvdObserver) -> None:
        """Every pair of factors, then all other tensors as they are."""
        adapted = [module for module in self.plan.modules if module.rank is not None]
        adapted.sort(key=lambda module: natural_order(module.path))
        observer.on_start(len(adapted))
        written: set[str] = set()
        for module in adapted:
            written |= self._module(module)
            observer.on_matrix(module.path, self.sites[-1])
        for ref in self.plan.tensors:
            if ref.key not in written:
                self.writer.add(ref.key, self._read(ref, finite=False))

    def _module(self, module: ModulePlan) -> set[str]:
        parts = (Part.A, Part.B) if Part.A in module.parts else (Part.EMBED_A, Part.EMBED_B)
        refs = [module.parts[part] for part in parts]
        a, b = (self._read(ref, finite=True) for ref in refs)
        found = _Product.of(a, b, module.scaling)
        rank, old, rule = self.settings.ranks.choose(found.spectrum), a.shape[0], self.settings.ranks
        if rank >= old or (rule.rank is not None and rule.rank >= old):
            self.ranks[module.path], self.alphas[module.path] = old, self.plan.config.alpha(module.path)
            self.sites.append(found.report(module, old, 0.0))
            return set()
        self.num_compressed += 1
        self.ranks[module.path] = rank
        self.alphas[module.path] = math.sqrt(rank) if self.plan.config.use_rslora else float(rank)  # a scaling of 1
        a, b = found.factors(rank, self._dtype(a), self._dtype(b))
        self.writer.add(refs[0].key, a)
        self.writer.add(refs[1].key, b)
        self.sites.append(found.report(module, rank, found.error(a, b)))
        written = {ref.key for ref in refs}
        return written | {self._bias(module)} if Part.B_BIAS in module.parts else written

    def _dtype(self, factor: torch.Tensor) -> torch.dtype:
        return factor.dtype if self.settings.dtype is None else self.settings.dtype.torch

    def _bias(self, module: ModulePlan) -> str:
        """PEFT scales the bias of LoRA as it scales B."""
        ref = module.parts[Part.B_BIAS]
        bias = self._read(ref, finite=True)
        self.writer.add(ref.key, (bias.double() * module.scaling).to(bias.dtype))
        return ref.key

    def _read(self, ref: TensorRef, *, finite: bool) -> torch.Tensor:
        with safe_open(self.plan.folder.home / ref.file, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(ref.key).clone()
        if finite and not bool(torch.isfinite(tensor).all()):
            ref.refuse("NOT_FINITE", "has a NaN or an infinite value; its training diverged")
        return tensor


@dataclass(frozen=True, slots=True)
class _Product:
    """`scaling * b @ a` by its thin decompositions, in float64."""

    q_b: torch.Tensor  # [d_out, k]
    q_a: torch.Tensor  # [d_in, l]
    core: torch.Tensor  # [k, l]
    u: torch.Tensor
    vh: torch.Tensor
    spectrum: Spectrum

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scaling: float) -> _Product:
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        core = scaling * r_b @ r_a.T
        u, spectrum, vh = decompose_core(core)
        return cls(q_b, q_a, core, u, vh, spectrum)

    def factors(self, rank: int, dtype_a: torch.dtype, dtype_b: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [rank, d_in], B [d_out, rank]) whose product is the best approximation, scaling included."""
        roots = torch.from_numpy(self.spectrum.squares[:rank].copy()).pow(0.25)
        b = (self.q_b @ self.u[:, :rank] * roots).to(dtype_b)
        a = ((self.q_a @ self.vh[:rank].T) * roots).T.to(dtype_a).contiguous()
        check_finite(a, b)
        return a, b

    def error(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """‖product − b a‖ / ‖product‖, in the bases of the decompositions and, for what rounding put there, outside."""
        left, right = b.double(), a.double().T
        in_left, in_right = self.q_b.T @ left, self.q_a.T @ right
        core = self.core - in_left @ in_right.T
        out_left, out_right = left - self.q_b @ in_left, right - self.q_a @ in_right
        rest = _norm2(in_left, out_right) + _norm2(out_left, right)
        total = self.spectrum.total
        return (float(core.square().sum() + rest) / total) ** 0.5 if total else 0.0

    def report(self, module: ModulePlan, rank: int, error: float) -> SiteReport:
        """What the site keeps at a rank."""
        return SiteReport(
            module.path,
            (self.q_b.shape[0], self.q_a.shape[0]),
            rank,
            self.spectrum.energy(rank),
            error,
            self.spectrum.total**0.5,
            old_rank=module.rank,
            energy_at=energy_curve(self.spectrum, rank),
        )


def _norm2(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """‖left @ right.T‖² of two tall matrices, by their Gram matrices."""
    return ((left.T @ left) * (right.T @ right)).sum()


def _copy_beside(plan: AdapterPlan, out: Path) -> None:
    """Labels, tokenizer, pooling and notes; weights and the state of a training stay behind."""
    for name in _names_beside(plan):
        source = plan.folder.find(name)
        if source is not None:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, out / name)


def _names_beside(plan: AdapterPlan) -> Iterator[str]:
    skipped = {CONFIG_FILE, METADATA_FILE}
    patterns = (*_WEIGHTS, *_STATE_OF_TRAINING)
    for path in sorted({*plan.folder.root.iterdir(), *plan.folder.home.iterdir()}):
        if path.is_file() and path.name not in skipped and not any(path.match(pattern) for pattern in patterns):
            yield path.name
    yield POOLING_FILE
