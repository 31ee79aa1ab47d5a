"""Runs that are interrupted and gone on with, from the library and from the command line; several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.checkpoints import is_resumable, run_path
from lora_runtime.train.progress import EvalReport, SilentObserver, TrainPlan
from lora_runtime.train.run import train
from lora_runtime.train.settings import Init, Optimizer, Schedule, TrainSettings
from server.cli_train import train_app
from server.train_cli.progress import TrainProgress
from tests.training import make_bases, topics

STEPS_PER_EPOCH = 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_bases(tmp_path_factory.mktemp("bases"), ("bert", "steady"))


@pytest.fixture
def settings(tmp_path: Path, bases: dict[str, str]) -> TrainSettings:
    return topics(tmp_path, bases["bert"]).changed(epochs=3)


class StopAt(SilentObserver):
    """Raises in a step."""

    def __init__(self, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self._step = step
        self._error = error

    def on_step(self, step: int, loss: float) -> None:
        del loss
        if step == self._step:
            raise self._error


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


CHOICES = [
    (3, {"dropout": 0.1}),  # in the first epoch, before any validation pass
    (STEPS_PER_EPOCH, {}),  # at the end of one
    (9, {"schedule": Schedule.REDUCE_ON_PLATEAU, "eval_steps": 4}),
    pytest.param(8, {"optimizer": Optimizer.LORA_FA, "gradient_accumulation": 1}, marks=pytest.mark.slow),
    pytest.param(8, {"init": Init.PISSA}, marks=pytest.mark.slow),
    pytest.param(8, {"init": Init.EVA, "loraplus_ratio": 4.0}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("step", "choices"), CHOICES, ids=str)
def test_a_resumed_run_writes_the_bytes_of_one_that_was_never_interrupted(
    settings: TrainSettings, step: int, choices: dict[str, object]
) -> None:
    settings = settings.changed(**choices)
    whole = train(settings.changed(out=settings.run.out.with_name("whole")))
    with pytest.raises(KeyboardInterrupt):
        train(settings, StopAt(step))
    assert is_resumable(settings.run.out)
    assert not settings.run.out.exists()
    report = train(settings.changed(resume=True))
    assert files_of(settings.run.out) == files_of(whole.out)
    assert report.passes == whole.passes
    assert report.step_losses == whole.step_losses
    assert sorted(path.name for path in settings.run.out.parent.iterdir()) == ["topics", "whole"]


def test_a_run_interrupted_twice_goes_on_twice(settings: TrainSettings) -> None:
    whole = train(settings.changed(out=settings.run.out.with_name("whole")))
    for step, resume in ((4, False), (11, True)):
        with pytest.raises(KeyboardInterrupt):
            train(settings.changed(resume=resume), StopAt(step))
    train(settings.changed(resume=True))
    assert files_of(settings.run.out) == files_of(whole.out)


def test_a_crash_goes_on_from_the_last_epoch(settings: TrainSettings) -> None:
    whole = train(settings.changed(out=settings.run.out.with_name("whole")))
    with pytest.raises(MemoryError):
        train(settings, StopAt(10, MemoryError))
    train(settings.changed(resume=True))
    assert files_of(settings.run.out) == files_of(whole.out)


def test_a_search_that_prunes_leaves_nothing(settings: TrainSettings) -> None:
    class Pruned(Exception):
        pass

    class Pruner(SilentObserver):
        def on_eval(self, report: EvalReport) -> None:
            if report.epoch == 2:
                raise Pruned

    with pytest.raises(Pruned):
        train(settings.changed(keep_checkpoints=False), Pruner())
    assert list(settings.run.out.parent.iterdir()) == []


def test_what_cannot_be_gone_on_with_is_refused_and_kept(settings: TrainSettings) -> None:
    with pytest.raises(InvalidRequest, match=r"no interrupted run of .*topics to go on with"):
        train(settings.changed(resume=True))
    with pytest.raises(KeyboardInterrupt):
        train(settings, StopAt(8))
    with pytest.raises(InvalidRequest, match=r"had learning_rate 0\.02, this one has 0\.01") as caught:
        train(settings.changed(resume=True, learning_rate=1e-2))
    assert caught.value.field == "resume"
    settings.data.train.write_text(settings.data.train.read_text().replace("cat", "cow"))
    with pytest.raises(InvalidRequest, match="had rows"):
        train(settings.changed(resume=True))
    with pytest.raises(InvalidRequest, match="is kept beside it; go on with resume, or start over with overwrite"):
        train(settings)
    assert is_resumable(settings.run.out)
    train(settings.changed(overwrite=True))
    assert not run_path(settings.run.out).exists()


def test_two_runs_of_one_folder_do_not_meet(settings: TrainSettings) -> None:
    class Second(SilentObserver):
        refusal = ""

        def on_start(self, plan: TrainPlan) -> None:
            del plan
            with pytest.raises(InvalidRequest, match="another run is training") as caught:
                train(settings)
            Second.refusal = caught.value.field

    train(settings.changed(epochs=1), Second())
    assert Second.refusal == "out"


def command(settings: TrainSettings, *more: str) -> list[str]:
    return [
        *("classify", "--base", settings.base, "--train", str(settings.data.train), "--out", str(settings.run.out)),
        *("--valid", str(settings.data.valid), "--rank", "4", "--max-length", "16", "--threads", "1", *more),
    ]


def test_control_c_stops_after_a_step_and_says_how_to_go_on(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = TrainProgress.on_eval

    def interrupted(self: TrainProgress, report: EvalReport) -> None:
        drawn(self, report)
        if report.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainProgress, "on_eval", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = CliRunner().invoke(train_app, command(settings, "--epochs", "3"))
    assert result.exit_code == 130, result.output
    assert "epoch 2/3" not in result.stdout
    assert "stopping after this step" in result.stdout
    assert "interrupted: give the same command with --resume to go on from where it is" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before
    assert not settings.run.out.exists()
    again = CliRunner().invoke(train_app, command(settings, "--epochs", "2", "--resume"))
    assert again.exit_code == 1
    assert "the interrupted run had epochs 3, this one has 2" in again.stderr
    monkeypatch.setattr(TrainProgress, "on_eval", drawn)
    resumed = CliRunner().invoke(train_app, command(settings, "--epochs", "3", "--resume"))
    assert resumed.exit_code == 0, resumed.output
    assert "epoch 1/3" not in resumed.stdout
    assert "epoch 3/3" in resumed.stdout
    assert [path.name for path in settings.run.out.parent.iterdir()] == ["topics"]


def test_control_c_while_the_base_is_loading_leaves_nothing(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: TrainProgress, plan: TrainPlan) -> None:
        del self, plan
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainProgress, "on_start", interrupted)
    result = CliRunner().invoke(train_app, command(settings))
    assert result.exit_code == 130, result.output
    assert "nothing is left of it; there was no checkpoint yet" in result.stderr
    assert list(settings.run.out.parent.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(settings: TrainSettings, bases: dict[str, str]) -> None:
    settings = settings.changed(base=bases["steady"])
    options = ("--epochs", "2", "--dropout", "0", "--learning-rate", "0.005", "--device", "cpu")
    alone = CliRunner().invoke(train_app, command(settings, *options, "--batch-size", "10"))
    assert alone.exit_code == 0, alone.output
    both = settings.changed(out=settings.run.out.with_name("both"))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "server.cli", "train", *command(both, *options, "--batch-size", "5")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert done.stdout.count("adapter written to") == 1
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (settings.run.out, both.run.out))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-4), name
    assert sorted(path.name for path in settings.run.out.parent.iterdir()) == ["both", "topics"]
