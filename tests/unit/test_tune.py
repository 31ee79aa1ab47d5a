"""`multilora tune` takes the fastest right candidate, and says so when there is nothing to tune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from lora_runtime.kernels.grouped_lora.triton_backend.tuner import (
    Candidate,
    Case,
    OutputDiffers,
    Timed,
    Workload,
    choose,
    expand_candidates,
    first_candidate,
    shrink_candidates,
    table_of,
    tune_case,
)
from lora_runtime.kernels.grouped_lora.triton_backend.tuning import TuningTable, read_table
from server.cli import app

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multilora(*arguments: str, columns: int = 200, devices: str = "") -> subprocess.CompletedProcess[str]:
    """The command on a machine where CUDA sees `devices` alone."""
    command = [sys.executable, "-c", "from server.cli import app; app()", *arguments]
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ |= {"CUDA_VISIBLE_DEVICES": devices, "COLUMNS": str(columns)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environ)


def test_without_a_gpu_it_says_that_there_is_nothing_to_tune() -> None:
    done = multilora("tune", "--shapes", "64:64")
    assert done.returncode == 1
    assert "nothing to tune on this device" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.slow
def test_a_dry_run_lists_the_cases_and_checks_the_smallest() -> None:
    done = multilora("tune", "--shapes", "48:36, 64:32", "--ranks", "16,64", "--tokens", "16", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for case in ("48 → 36, rank 16, 16 tokens", "64 → 32, rank 64, 16 tokens"):
        assert case in done.stdout
    assert "4 cases" in done.stdout
    assert "48 → 36, rank 16, 16 tokens: error " in done.stdout
    assert "nothing was timed" in done.stdout


@pytest.mark.slow
def test_the_shapes_of_a_base_are_its_sites(tiny_bert: Path) -> None:
    arguments = ("--base", str(tiny_bert), "--ranks", "16", "--tokens", "16", "--dtype", "float32", "--dry-run")
    done = multilora("tune", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    for shape in ("36 → 36", "36 → 52", "52 → 36"):
        assert f"{shape}, rank 16, 16 tokens" in done.stdout
    assert "3 cases" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--shapes", "64"), "'64' is not two widths, such as 768:3072"),
        (("--shapes", "64:0"), "'64:0' is not two widths"),
        (("--shapes", ","), "names no shape"),
        (("--shapes", "64:64", "--base", "x"), "give either --base or --shapes"),
        (("--ranks", "16"), "give either --base or --shapes"),
        (("--shapes", "64:64", "--ranks", "8"), "'8' is not one of 16, 64, 256"),
        (("--shapes", "64:64", "--tokens", "16,x"), "'x' is not one of 16, 64, 256, 1024, 4096"),
        (("--shapes", "64:64", "--dtype", "int8"), "'int8' is not one of float32, float16, bfloat16"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: tuple[str, ...], reason: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune", *arguments, "--dry-run"])
    assert done.exit_code == 2
    assert reason in done.stderr


def test_help_fits_80_columns_and_names_every_flag() -> None:
    done = multilora("tune", "--help", columns=80)
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for flag in ("--base", "--shapes", "--dtype", "--ranks", "--tokens", "--out", "--dry-run"):
        assert flag in done.stdout
    assert "…" not in done.stdout.replace("d_in:d_out,…", ""), "something was cut"


def test_a_candidate_with_another_output_is_not_timed() -> None:
    workload = Workload(Case(48, 36, 16, 4), DEVICE, torch.float32)
    candidate = first_candidate(workload.case)
    assert workload.check(candidate) < 1e-5
    workload.exact += 1e-3 * workload.exact.norm() / workload.exact.numel() ** 0.5
    with pytest.raises(OutputDiffers, match="48 → 36, rank 16, 4 tokens: error 1"):
        workload.seconds(candidate)
    workload.exact.fill_(float("nan"))
    with pytest.raises(OutputDiffers):
        workload.check(candidate)


def test_the_workload_gives_each_adapter_its_rows() -> None:
    plan = Workload(Case(16, 16, 16, 70), DEVICE, torch.float32).plan()
    assert plan.num_rows == 70
    assert sorted({segment.num_rows for segment in plan.segments}) == [2, 3]
    assert len(plan.segments) == 32


def test_the_fastest_shrink_is_kept_then_the_fastest_expand_with_it() -> None:
    case = Case(512, 256, 64, 16)
    best = list(shrink_candidates(case))[17], list(expand_candidates(case))[5]
    assert best[0] != first_candidate(case).shrink

    def seconds(candidate: Candidate) -> float:
        return 3.0 - (candidate.shrink == best[0]) - (candidate.expand == best[1])

    timed = tune_case(Workload(case, DEVICE, torch.float32), 32, seconds)
    assert (timed.candidate, timed.seconds) == (Candidate(32, *best), 1.0)


@pytest.mark.parametrize("case", [Case(16, 16, 16, 16), Case(768, 3072, 256, 4096), Case(36, 52, 64, 64)])
def test_candidates_are_distinct_and_split_into_whole_blocks(case: Case) -> None:
    shrinks, expands = list(shrink_candidates(case)), list(expand_candidates(case))
    assert len({str(config) for config in shrinks}) == len(shrinks) > 1
    assert len({str(config) for config in expands}) == len(expands) > 1
    assert all(s.split == 1 or s.split * s.block_in <= case.d_in for s in shrinks)


def timed(case: Case, tile_rows: int, microseconds: float, split: int = 1) -> Timed:
    first = first_candidate(case, tile_rows)
    candidate = Candidate(tile_rows, first.shrink.model_copy(update={"split": split}), first.expand)
    return Timed(case, candidate, microseconds / 1e6)


def test_rows_of_a_tile_are_chosen_for_all_shapes_together() -> None:
    """Tiles of 32 rows lose 10 % on the large shape and win half on the small one."""
    small, large = Case(64, 64, 16, 64), Case(4096, 4096, 16, 64)
    decode = Case(64, 64, 16, 16)
    results = [timed(small, 16, 10), timed(small, 32, 5), timed(large, 16, 100), timed(large, 32, 110)]
    results += [timed(decode, 16, 3), timed(decode, 32, 4)]
    chosen = choose(results)
    assert {tokens: {one.candidate.tile_rows for one in found} for tokens, found in chosen.items()} == {
        16: {16},
        64: {32},
    }
    assert [one.case for one in chosen[64]] == [small, large]


def test_what_was_chosen_is_what_a_server_reads(tmp_path: Path) -> None:
    case, wide = Case(64, 64, 16, 64), Case(64, 256, 16, 64)
    results = [timed(wide, 64, 9, split=4), timed(case, 64, 5, split=2), timed(case, 32, 50, split=8)]
    path = tmp_path / "table.json"
    file = table_of(results, "Some GPU", "9.0", torch.float16)
    path.write_text(file.model_dump_json(), encoding="utf-8")
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__
    table = TuningTable.of(read_table(path))
    assert table.tile_rows_for(64) == 64
    assert table.shrink_for(64, 16, 64).split == 4, "the shrink is that of the widest projection of this input"
    assert {key[0] for key in table.expand} == {64, 256}


@pytest.mark.gpu
@pytest.mark.slow
def test_a_table_is_made_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    arguments = ("--shapes", "64:64", "--ranks", "16", "--tokens", "16", "--dtype", "float16", "--out", str(path))
    done = multilora("tune", *arguments, devices="0")
    assert done.returncode == 0, done.stdout + done.stderr
    file = read_table(path)
    assert (file.device, file.dtype) == (torch.cuda.get_device_name(), "float16")
    assert len(file.shrink) == len(file.expand) == 1
