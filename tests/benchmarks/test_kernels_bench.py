"""The kernel benchmark refuses wrong contenders before it times them, and its file has what the table needs."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.bench.measure import OutputsDiffer
from tests.benchmarks import kernels, kernels_others
from tests.benchmarks.kernels import CONTENDERS, KernelBench, check_contenders, main, run_kernel_bench
from tests.benchmarks.kernels_contenders import Contender, NotMeasured, Turn, own
from tests.benchmarks.kernels_problem import SHAPES, Case, Problem, Shape, cases_of
from tests.benchmarks.kernels_table import kernels_table
from tests.benchmarks.kernels_timing import event_seconds

TINY = Shape("tiny", 16, (16, 32))
PACKED = Case.packed(TINY, 12, 4, (8, 16))
RAGGED = Case.ragged(TINY, 14, 4, (8, 16))
DECODE = Case.packed(TINY, 4, 4, (8,))
ONE = Case.packed(TINY, 6, 1, (8,))
BENCH = KernelBench(rounds=2, threads=1, quick=True)
CPU = torch.device("cpu")


def run(cases: list[Case], contenders: dict[str, Contender] = CONTENDERS) -> dict[str, Any]:
    return run_kernel_bench(BENCH, lambda _: None, contenders, cases)


def of_the_next_adapter(problem: Problem) -> Turn:
    """Ours, but every segment gets its neighbour's adapter."""
    return own(replace(problem, order=problem.order[1:] + problem.order[:1]))


def with_a_nan(problem: Problem) -> Turn:
    def spoiled() -> list[torch.Tensor]:
        outs = own(problem).run()
        outs[-1][0, 0] = float("nan")
        return outs

    return Turn(spoiled)


def wrong_the_second_time(problem: Problem) -> Turn:
    turns = iter([own(problem).run, problem.base])
    return Turn(lambda: next(turns)())


def without_scaling(problem: Problem) -> Turn:
    unscaled = Problem.make(problem.case, problem.device, problem.dtype)
    unscaled.slots.scaling.fill_(1.0)
    return own(unscaled)


@pytest.mark.parametrize("wrong", [of_the_next_adapter, with_a_nan, wrong_the_second_time, without_scaling])
def test_a_wrong_contender_is_refused_and_nothing_is_timed(wrong: Contender, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object) -> None:
        raise AssertionError("a case with a wrong contender was timed")

    monkeypatch.setattr(kernels, "time_contenders", timed)
    with pytest.raises(OutputsDiffer, match=r"tiny.*'mistaken'.*not timed"):
        run([PACKED], {**CONTENDERS, "mistaken": wrong})


def test_a_wrong_contender_ends_the_command_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "loop", of_the_next_adapter)
    monkeypatch.setitem(SHAPES, "minilm", (TINY,))
    out = tmp_path / "out.json"
    assert main(["--quick", "--shapes", "minilm", "--rounds", "1", "--out", str(out)]) == 1
    assert not out.exists()


def test_deltas_too_small_to_be_compared_are_refused() -> None:
    problem = Problem.make(PACKED, CPU, torch.float32)
    problem.slots.scaling.fill_(1e-6)
    with pytest.raises(OutputsDiffer, match="too little to compare"):
        check_contenders(problem, {})


@pytest.mark.parametrize("case", [PACKED, RAGGED, DECODE, ONE], ids=lambda case: case.name)
def test_every_contender_that_runs_here_is_right_and_in_the_file(case: Case) -> None:
    (done,) = run([case])["cases"]
    expected = set(CONTENDERS) - {"vllm"} - ({"merged"} if case.num_adapters > 1 else set())
    assert expected - {"polylora", "grouped_mm"} <= set(done["microseconds"])  # those two where torch and pip have them
    assert set(done["microseconds"]) | set(done["not_measured"]) == set(CONTENDERS)
    assert set(done["errors"]) == set(done["microseconds"])
    assert 0 < done["errors"]["own"] < 1e-6
    for spread in done["microseconds"].values():
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]


def test_a_ratio_is_ours_over_the_other_in_the_same_round() -> None:
    spread = kernels.time_ratio({"own": [2.0, 6.0, 4.0], "loop": [1.0, 2.0, 4.0]}, "own", "loop")
    assert (spread.low, spread.median, spread.high) == (1.0, 2.0, 3.0)


def test_a_reason_stands_where_a_contender_cannot_run() -> None:
    def absent(_: Problem) -> Turn:
        raise NotMeasured("it is not here")

    result = run([PACKED], {**CONTENDERS, "vllm": absent})
    assert result["cases"][0]["not_measured"]["vllm"] == "it is not here"
    assert not any("vllm" in name for name in result["ratios"])
    assert "| vLLM's Triton kernels | not measured: it is not here |" in kernels_table("kernels-cpu", result)


def test_vllm_is_called_as_its_kernels_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documented interface, played by plain PyTorch: shapes, slices, order of arguments and scaling are checked."""
    problem = Problem.make(RAGGED, CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "vllm.lora.ops.triton_ops", VllmOps)
    monkeypatch.setattr(kernels_others, "VLLM_DEVICE", "cpu")
    monkeypatch.setattr(kernels_others, "VLLM_DTYPES", (torch.float32,))
    assert check_contenders(problem, {"vllm": kernels_others.vllm(problem)})["vllm"] < 1e-6


class VllmOps:
    """`lora_shrink` and `lora_expand` of vllm.lora.ops.triton_ops in loops."""

    class LoRAKernelMeta:
        def __init__(self, max_tokens: int) -> None:
            self.owner = torch.full((max_tokens,), -1)

        @classmethod
        def make(cls, max_loras: int, max_num_tokens: int, device: torch.device) -> VllmOps.LoRAKernelMeta:
            assert max_loras > 0 and device.type == "cpu"
            return cls(max_num_tokens)

        def prepare_tensors(self, token_lora_mapping: torch.Tensor) -> None:
            self.owner.copy_(token_lora_mapping)

        def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[torch.Tensor]:
            assert specialize_active_lora
            return (self.owner[:token_nums],)

    @staticmethod
    def lora_shrink(
        x: torch.Tensor, a: list[torch.Tensor], out: torch.Tensor, owner: torch.Tensor, scaling: float
    ) -> None:
        assert out.is_contiguous() and all(stack.is_contiguous() for stack in a)
        for site, stack in enumerate(a):
            out[site] = scaling * torch.einsum("td,trd->tr", x, stack[owner])

    @staticmethod
    def lora_expand(
        shrunk: torch.Tensor,
        b: list[torch.Tensor],
        out: torch.Tensor,
        owner: torch.Tensor,
        offset_start: int = 0,
        add_inputs: bool = False,
    ) -> None:
        assert add_inputs and all(stack.is_contiguous() for stack in b)
        column = offset_start
        for site, stack in enumerate(b):
            out[:, column : column + stack.shape[1]] += torch.einsum("tr,tdr->td", shrunk[site], stack[owner])
            column += stack.shape[1]


def test_the_table_has_every_case_of_a_quick_run_and_says_what_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "minilm", (TINY,))
    out = tmp_path / "kernels-cpu.json"
    assert main(["--quick", "--shapes", "minilm", "--rounds", "2", "--threads", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    table = kernels_table("kernels-cpu", result)
    assert all(f"| {case.name} | " in table for case in cases_of(TINY, quick=True))
    assert "not measured: its kernels are Triton for CUDA" in table
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert max(result["largest_error"].values()) < result["tolerance"]


class ForgetfulCapture:
    """Keeps what a call launched, as a CUDA graph does, and not what it needs for that."""

    def capture(self, forward: Any) -> Any:
        outs = forward()
        return SimpleNamespace(replay=lambda: outs)


def test_a_captured_call_keeps_what_it_reads() -> None:
    class Read(torch.nn.Module):
        def forward(self) -> list[torch.Tensor]:
            return [torch.ones(1)]

    call = Read()
    kept = weakref.ref(call)
    turn = kernels._captured(Turn(call), ForgetfulCapture())
    del call
    gc.collect()
    assert kept() is not None and turn.run()[0].item() == 1
    with pytest.raises(NotMeasured, match="the host makes part"):
        kernels._captured(replace(turn, on_host=True), ForgetfulCapture())


class FakeEvent:
    """A clock that gains 3 ms from each event to the next."""

    now_ms = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at_ms = float("nan")

    def record(self) -> None:
        FakeEvent.now_ms += 3.0
        self.at_ms = FakeEvent.now_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at_ms - self.at_ms


def test_on_a_gpu_the_time_of_a_call_is_that_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flushed, seen = torch.ones(8, dtype=torch.int8), list[int]()

    def call() -> None:
        seen.append(int(flushed.sum()))
        flushed.fill_(1)

    assert event_seconds(call, 5, flushed) == pytest.approx(0.003)
    assert seen == [0] * 5  # the cache was overwritten before each call


def test_the_bandwidth_counts_every_byte_once() -> None:
    problem = Problem.make(PACKED, CPU, torch.float32)
    ranks = 8 + 16 + 8 + 16
    elements = (16 + 32) * 16 + 12 * (16 + 16 + 32) + ranks * (16 + 16 + 16 + 32)  # weights, rows, A and B of two sites
    assert problem.least_bytes == 4 * elements
    found = kernels.bandwidth(problem, {"floor": [1.0], "own": [0.5, 1.0, 2.0]}, available=16.0 * elements)
    assert found["bytes_per_second"] == {"own": {"median": 4 * elements, "low": 2 * elements, "high": 8 * elements}}
    assert found["share_of_copy"] == {"own": 0.25}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_a_gpu_every_contender_is_right(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "kernels-cuda.json"
    assert main(["--device", "cuda", "--dtype", dtype, "--quick", "--shapes", "minilm", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["machine"]["accelerator"]["name"]
    assert all(0 < case["bandwidth"]["share_of_copy"]["own"] < 2 for case in result["cases"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt9"], "'gpt9' is not known"),
        (["--without", "own"], "cannot be left out"),
        pytest.param(
            ["--device", "cuda"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_all_batches_have_the_tokens_and_adapters_that_their_names_say() -> None:
    pairs = {(case.num_tokens, case.num_adapters) for case in cases_of(TINY)}
    assert pairs == {(t, n) for t in (64, 256, 2048) for n in (1, 8, 32, 64) if (t, n) != (64, 64)} | {(32, 32)}
    (case,) = (case for case in cases_of(TINY) if case.kind == "ragged")
    assert min(case.lengths) >= 1 and len(set(case.lengths)) > 5 and sum(case.lengths) == 256
