"""A LoRA backend is chosen once, by device and dtype, and never replaced silently."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_runtime.arena import ALayout, RankArena, SlotTable
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.kernels.gemm_batch import GemmBatch
from lora_runtime.kernels.grouped_lora import registry
from lora_runtime.kernels.grouped_lora.cpu import CpuGroupedLora
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.kernels.grouped_lora.registry import BACKENDS, BackendResources, choose_backend
from lora_runtime.types import SiteGroup


def resources(
    dtype: torch.dtype = torch.float32, tuning_file: Path | None = None, layout: ALayout = ALayout.RANK_COLUMNS
) -> BackendResources:
    slots = SlotTable(1, (SiteGroup(0, 16, ()),), a_layout=layout)
    return BackendResources(RankArena(1 << 16, dtype), slots, dtype, stack_bytes=1 << 10, tuning_file=tuning_file)


def test_the_device_decides_when_nothing_is_named() -> None:
    assert choose_backend("cpu", torch.float32).name == ("cpu" if GemmBatch.find() is None else "mkl")
    pytest.importorskip("triton")
    assert choose_backend("cuda", torch.bfloat16).name == "triton"
    assert choose_backend(torch.device("cuda", 1), torch.float32).name == "triton"


def test_backends_are_made_of_their_own_class() -> None:
    assert isinstance(choose_backend("cpu", torch.float32, "cpu").make(resources()), CpuGroupedLora)
    assert isinstance(choose_backend("cpu", torch.float16, "reference").make(resources()), ReferenceGroupedLora)


def test_a_torch_without_mkl_serves_with_the_portable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GemmBatch, "find", staticmethod(lambda: None))
    assert choose_backend("cpu", torch.float32).name == "cpu"
    with pytest.raises(BaseModelUnsupported, match="has no MKL, or one that failed its proof; choose the backend cpu"):
        choose_backend("cpu", torch.float32, "mkl")


def test_triton_is_made_with_the_users_table(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    broken = tmp_path / "mine.json"
    broken.write_text("{}", encoding="utf-8")
    with pytest.raises(BaseModelUnsupported, match=r"mine\.json"):
        BACKENDS["triton"].make(resources(tuning_file=broken))
    made = BACKENDS["triton"].make(resources(layout=ALayout.RANK_ROWS))
    assert type(made).__name__ == "TritonGroupedLora"


@pytest.mark.parametrize(
    ("device", "dtype", "name", "parts"),
    [
        ("cpu", torch.float32, "tritn", ["'tritn' does not exist", "reference, mkl, cpu, triton"]),
        ("cpu", torch.bfloat16, "cpu", ["'cpu' cannot serve", "float32, not bfloat16"]),
        ("cuda", torch.float32, "cpu", ["'cpu' cannot serve", "not on cuda", "choose another backend"]),
        ("cuda", torch.float64, "triton", ["'triton' cannot serve", "not float64"]),
        ("mps", torch.float32, None, ["device 'mps'", "cpu or cuda", "'reference'"]),
    ],
)
def test_what_cannot_serve_is_refused_with_the_value_and_the_remedy(
    device: str, dtype: torch.dtype, name: str | None, parts: list[str]
) -> None:
    with pytest.raises(BaseModelUnsupported) as caught:
        choose_backend(device, dtype, name)
    for part in parts:
        assert part in caught.value.message


def test_triton_that_is_not_installed_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    for name in ("triton", None):
        with pytest.raises(BaseModelUnsupported, match=r"triton is not installed; pip install 'multilora\[gpu\]'"):
            choose_backend("cuda", torch.float32, name)


@pytest.mark.slow
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_triton_runs_on_the_cpu_in_its_interpreter_alone(interpret: str) -> None:
    pytest.importorskip("triton")
    done = in_a_process("choose_backend('cpu', torch.float32, 'triton')", TRITON_INTERPRET=interpret)
    assert (done.returncode == 0) == (interpret == "1"), done.stderr
    assert interpret == "1" or "TRITON_INTERPRET=1; choose the backend cpu" in done.stderr


def test_choosing_does_not_import_triton() -> None:
    choices = "choose_backend('cpu', torch.float32); choose_backend('cuda', torch.float32); "
    if importlib.util.find_spec("triton") is None:
        choices = "choose_backend('cpu', torch.float32); "
    done = in_a_process(choices + "import sys; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


def in_a_process(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    imports = "import torch; from lora_runtime.kernels.grouped_lora.registry import choose_backend; "
    command = [sys.executable, "-c", imports + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environ)
