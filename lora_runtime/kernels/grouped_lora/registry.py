"""The backends of `grouped_lora` by name, and the choice of one, made once at the start.

What a backend needs is imported when it is chosen. Nothing is replaced silently: a backend that was named and cannot
serve is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from lora_runtime.arena import ALayout, RankArena, SlotTable
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.kernels.gemm_batch import GemmBatch
from lora_runtime.kernels.grouped_lora.api import GroupedLora
from lora_runtime.kernels.grouped_lora.cpu import CpuGroupedLora
from lora_runtime.kernels.grouped_lora.mkl import MklGroupedLora
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora

TOLERANCES = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}  # relative Frobenius, against fp64
_ALL_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FP32 = (torch.float32,)


@dataclass(frozen=True, slots=True)
class BackendResources:
    """What a backend is bound to, and what it may use."""

    arena: RankArena
    slots: SlotTable
    dtype: torch.dtype  # of the activations
    stack_bytes: int = 32 << 20  # for copies that make it faster
    tuning_file: Path | None = None  # None: the packaged tables


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What a backend serves, and how it is made."""

    name: str
    device_types: tuple[str, ...]  # () where it serves any
    dtypes: tuple[torch.dtype, ...]  # of the activations
    make: Callable[[BackendResources], GroupedLora]
    a_layout: ALayout = ALayout.RANK_COLUMNS  # of the images it reads; the slot table is made with it
    arena_dtypes: tuple[torch.dtype, ...] = _ALL_FLOATS  # of the images it reads
    makes_stacks: bool = False  # takes `stack_bytes`
    is_built: Callable[[], bool] = lambda: True  # whether this build of torch has what it calls
    requires: str | None = None  # a package
    interpreter: str | None = None  # a variable under which it runs on the CPU too, slowly, to be tested

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve there, with the remedy; None when it can."""
        if dtype not in self.dtypes:
            return f"it serves {_names(self.dtypes)}, not {_name(dtype)}; choose one of those dtypes"
        if not self.is_built():
            return "this build of torch has no MKL, or one that failed its proof; choose the backend cpu"
        if self.requires is not None and find_spec(self.requires) is None:
            return f"{self.requires} is not installed; pip install 'multilora[gpu]'"
        if self.device_types and device.type not in self.device_types:
            if self.interpreter is not None and device.type == "cpu":
                return None if _is_interpreted() else _NOT_INTERPRETED
            return f"it runs on {' or '.join(self.device_types)}, not on {device.type}; choose another backend"
        return None


def _make_reference(resources: BackendResources) -> GroupedLora:
    return ReferenceGroupedLora(resources.arena)


def _make_mkl(resources: BackendResources) -> GroupedLora:
    gemm = GemmBatch.find()
    assert gemm is not None, "chosen where MKL is"
    return MklGroupedLora(resources.arena, resources.slots, gemm)


def _make_cpu(resources: BackendResources) -> GroupedLora:
    return CpuGroupedLora(resources.arena, resources.slots, resources.stack_bytes)


def _make_triton(resources: BackendResources) -> GroupedLora:
    from lora_runtime.kernels.grouped_lora.triton_backend.backend import TritonGroupedLora
    from lora_runtime.kernels.grouped_lora.triton_backend.tuning import load_table

    table = load_table(resources.arena.buffer.device, resources.dtype, resources.tuning_file)
    return TritonGroupedLora(resources.arena, resources.slots, table)


def _has_mkl() -> bool:
    return GemmBatch.find() is not None


BACKENDS = {
    spec.name: spec
    for spec in (
        BackendSpec("reference", (), (*_ALL_FLOATS, torch.float64), _make_reference),
        BackendSpec("mkl", ("cpu",), _ALL_FLOATS, _make_mkl, arena_dtypes=_FP32, is_built=_has_mkl),
        BackendSpec("cpu", ("cpu",), _FP32, _make_cpu, arena_dtypes=_FP32, makes_stacks=True),
        BackendSpec(
            "triton",
            ("cuda",),
            _ALL_FLOATS,
            _make_triton,
            ALayout.RANK_ROWS,
            requires="triton",
            interpreter="TRITON_INTERPRET",
        ),
    )
}
_DEFAULTS = {"cpu": ("mkl", "cpu"), "cuda": ("triton",)}  # by device type, the first whose library torch has
_NOT_INTERPRETED = "it runs on cuda, and on the CPU only to be tested, with TRITON_INTERPRET=1; choose the backend cpu"


def backend_for_base(device: torch.device, dtype: torch.dtype, name: str | None = None) -> BackendSpec:
    """As `choose_backend`, for a base and adapters that are all in `dtype`; raises BaseModelUnsupported."""
    spec = choose_backend(device, dtype, name)
    if dtype not in spec.arena_dtypes:
        raise BaseModelUnsupported(
            f"dtype {_name(dtype)} is not served on {device.type} by LoRA backend {spec.name!r}, whose adapters are in "
            f"{_names(spec.arena_dtypes)}, which is also the faster one there; use dtype float32, or device cuda",
            backend=spec.name,
            device=device,
            dtype=_name(dtype),
        )
    return spec


def choose_backend(device: torch.device | str, dtype: torch.dtype, name: str | None = None) -> BackendSpec:
    """The backend called `name`, or the one for the device's type, for activations of `dtype`.

    Raises BaseModelUnsupported when there is none of that name or for that device, or when it cannot serve there.
    """
    device = torch.device(device)
    names = _DEFAULTS.get(device.type, ()) if name is None else (name,)
    if not names:
        raise BaseModelUnsupported(
            f"no LoRA backend is made for device {device.type!r}; serve on {' or '.join(_DEFAULTS)}, or name the slow "
            "backend 'reference'",
            device=device,
        )
    chosen = next((known for known in names if known in BACKENDS and BACKENDS[known].is_built()), names[-1])
    if (spec := BACKENDS.get(chosen)) is None:
        raise BaseModelUnsupported(
            f"LoRA backend {chosen!r} does not exist; choose one of {', '.join(BACKENDS)}", backend=chosen
        )
    if (why := spec.why_not(device, dtype)) is not None:
        raise BaseModelUnsupported(
            f"LoRA backend {chosen!r} cannot serve: {why}", backend=chosen, device=device, dtype=_name(dtype)
        )
    return spec


def _is_interpreted() -> bool:
    from lora_runtime.kernels.interpreting import IS_INTERPRETED

    return IS_INTERPRETED


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(_name, dtypes))
