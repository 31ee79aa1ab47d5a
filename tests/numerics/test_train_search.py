"""Searches: most of them over a made-up training that is quick and known, one over the real one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_runtime.adapters.digests import file_digests
from lora_runtime.errors import BaseModelUnsupported, InvalidRequest
from lora_runtime.train.checkpoints import run_path
from lora_runtime.train.private.settings import Privacy
from lora_runtime.train.progress import EvalReport, SilentObserver, TrainObserver, TrainPlan, TrainReport
from lora_runtime.train.run import train
from lora_runtime.train.search import run as run_module
from lora_runtime.train.search import trial as trial_module
from lora_runtime.train.search.progress import SearchReport, SilentSearchObserver, TrialState
from lora_runtime.train.search.run import search, search_path
from lora_runtime.train.search.space import Choice, Range, Space, Value, applied
from lora_runtime.train.settings import TrainSettings
from lora_runtime.train.tasks.options import ClassifyOptions
from lora_runtime.types import ProblemType, Task
from server.cli_train import train_app
from tests.training import FILES, make_bases, topics

RATES: Space = {"learning_rate": Range(1e-4, 1.0, log=True), "rank": Choice((2, 4))}
EPOCHS = 3


class MadeUp:
    """Stands in for `train`: the accuracy grows with the passes, and is best near a learning rate of 0.01."""

    def __init__(self) -> None:
        self.runs: list[TrainSettings] = []
        self.diverges_above = math.inf
        self.interrupt_run: int | None = None  # by its place in `runs`, from 1, in its second pass

    def __call__(self, settings: TrainSettings, observer: TrainObserver) -> TrainReport:
        self.runs.append(settings)
        rate = settings.optim.learning_rate
        if rate > self.diverges_above:
            raise InvalidRequest("learning_rate", "the loss was never finite: training diverged; lower it")
        plan = TrainPlan(
            Task.CLASSIFY,
            ("a", "b"),
            ProblemType.SINGLE_LABEL,
            8,
            4,
            0,
            0,
            EPOCHS,
            1,
            ("q",),
            {},
            "",
            "accuracy",
            "cpu",
        )
        observer.on_start(plan)
        passes: list[EvalReport] = []
        for step in range(1, EPOCHS + 1):
            if len(self.runs) == self.interrupt_run and step == 2:
                raise KeyboardInterrupt
            accuracy = (0.5 + 0.1 * step) * math.exp(-((math.log10(rate) + 2) ** 2))
            passes.append(EvalReport(step, step, 1.0, 1.0, {"accuracy": accuracy}, True))
            observer.on_eval(passes[-1])
        settings.run.out.mkdir(parents=True)
        (settings.run.out / "adapter_config.json").write_text(f"rate {rate}")
        return TrainReport(settings.run.out, plan, tuple(passes), passes[-1], (1.0,), 0.1)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    fake = MadeUp()
    monkeypatch.setattr(trial_module, "train", fake)
    monkeypatch.setattr(run_module, "train", fake)
    return fake


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    return topics(tmp_path, "base").changed(epochs=EPOCHS)


def outcome(report: SearchReport) -> list[tuple[TrialState, Mapping[str, Value], float | None]]:
    return [(trial.state, trial.values, trial.metric) for trial in report.trials]


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_the_trials_of_a_whole_one(settings: TrainSettings, made_up: MadeUp) -> None:
    whole = search(settings.changed(out=settings.run.out.with_name("whole")), RATES, 8)
    assert {trial.state for trial in whole.trials} == {TrialState.FINISHED, TrialState.PRUNED}
    assert len({trial.values["learning_rate"] for trial in whole.trials}) == 8
    made_up.interrupt_run = len(made_up.runs) + 4
    with pytest.raises(KeyboardInterrupt):
        search(settings, RATES, 8)
    assert not settings.run.out.exists()
    again = search(settings, RATES, 8)
    assert [trial.number for trial in again.plan.done] == [1, 2, 3, 4]
    assert again.plan.done[-1].state is TrialState.INTERRUPTED
    assert outcome(again) == outcome(whole)
    best = max(trial.metric or 0 for trial in again.trials if trial.state is TrialState.FINISHED)
    assert again.best.metric == best
    assert (settings.run.out / "adapter_config.json").read_text() == f"rate {again.best.values['learning_rate']}"


def test_a_bad_trial_ends_early_and_one_that_diverges_is_only_noted(settings: TrainSettings, made_up: MadeUp) -> None:
    made_up.diverges_above = 0.2
    report = search(settings, RATES, 9)
    states = [trial.state for trial in report.trials]
    assert states.count(TrialState.FAILED) >= 1
    assert states.count(TrialState.PRUNED) >= 1
    for trial in report.trials:
        assert (trial.values["learning_rate"] > 0.2) == (trial.state is TrialState.FAILED)
        assert ("diverged" in trial.reason) == (trial.state is TrialState.FAILED)
        if trial.state is TrialState.PRUNED:
            assert 2 <= trial.num_passes < EPOCHS
            assert trial.number > 5


@pytest.mark.slow
def test_more_trials_extend_a_search_whose_best_adapter_is_trained_again_if_it_is_gone(
    settings: TrainSettings, made_up: MadeUp, tmp_path: Path
) -> None:
    storage = tmp_path / "trials.db"
    first = search(settings, RATES, 2, storage=storage)
    assert len(made_up.runs) == 2
    other = settings.changed(out=tmp_path / "elsewhere" / "topics")
    second = search(other, RATES, 2, storage=storage)
    assert outcome(second) == outcome(first)
    assert len(made_up.runs) == 3  # the best one alone, whose folder is beside the other `out`
    assert made_up.runs[2].optim.learning_rate == first.best.values["learning_rate"]
    with pytest.raises(InvalidRequest, match=r"out: .* is not empty"):
        search(settings, RATES, 3, storage=storage)
    third = search(settings.changed(overwrite=True), RATES, 3, storage=storage)
    assert outcome(third)[:2] == outcome(first)
    assert len(third.trials) == 3


def test_another_search_is_not_mixed_into_the_same_trials(settings: TrainSettings, made_up: MadeUp) -> None:
    search(settings, RATES, 1)
    changed = settings.changed(overwrite=True)
    with pytest.raises(InvalidRequest, match=r"search_storage: .* has weight_decay 0.01, this one has 0.5"):
        search(changed.changed(weight_decay=0.5), RATES, 2)
    with pytest.raises(InvalidRequest, match=r"has space of rank 2,4, this one has 2,8"):
        search(changed, {**RATES, "rank": Choice((2, 8))}, 2)
    rows = settings.data.train
    rows.write_text(rows.read_text() + "a red cat,colours\n")
    with pytest.raises(InvalidRequest, match="has training rows sha256"):
        search(changed, RATES, 2)
    assert len(made_up.runs) == 1


def test_a_search_without_one_finished_trial_says_why(settings: TrainSettings, made_up: MadeUp) -> None:
    made_up.diverges_above = 0.0
    with pytest.raises(InvalidRequest, match=r"search: none of 2 trials finished; the last one: .* diverged"):
        search(settings, RATES, 2)
    assert not settings.run.out.exists()


def test_what_fails_every_trial_ends_the_search_and_leaves_nothing(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> TrainReport:
        raise BaseModelUnsupported("base 'base' is not there")

    monkeypatch.setattr(trial_module, "train", refuse)
    with pytest.raises(BaseModelUnsupported):
        search(settings, RATES, 2)
    assert not search_path(settings.run.out).exists()


def test_a_file_that_holds_no_trials_is_refused(settings: TrainSettings, made_up: MadeUp, tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("these are no trials at all" * 100)
    with pytest.raises(InvalidRequest, match=r"search_storage: .*notes\.db cannot be used as an SQLite file"):
        search(settings, RATES, 2, storage=tmp_path / "notes.db")
    assert not made_up.runs


def test_no_trial_starts_when_the_time_is_over(settings: TrainSettings, made_up: MadeUp) -> None:
    assert len(search(settings, RATES, 50, timeout_s=1e-3).trials) == 1
    assert len(search(settings.changed(overwrite=True), RATES, 50, timeout_s=1e-3).trials) == 2
    assert len(made_up.runs) == 2


def test_trials_are_compared_after_as_many_rows(settings: TrainSettings, made_up: MadeUp) -> None:
    space: Space = {"batch_size": Choice((8, 32)), "learning_rate": Range(1e-3, 1e-1)}
    search(settings.changed(eval_steps=10, batch_size=16), space, 6)
    found = {(run.optim.batch_size, run.optim.eval_steps) for run in made_up.runs}
    assert found == {(8, 20), (32, 5)}


@pytest.mark.parametrize(
    ("changes", "trials", "field"),
    [
        ({}, 0, "search"),
        ({"resume": True}, 2, "resume"),
        ({"task": ClassifyOptions(privacy=Privacy(epsilon=1.0))}, 2, "search"),
    ],
)
def test_what_has_no_meaning_in_a_search_is_refused(
    settings: TrainSettings, changes: dict[str, Any], trials: int, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        search(settings.changed(**changes), RATES, trials)
    assert caught.value.field == field


class StopsIn(SilentSearchObserver):
    """Interrupts a trial after a step, as Ctrl-C does."""

    def __init__(self, number: int, step: int) -> None:
        self.place = number, step

    def on_trial(self, number: int, values: Mapping[str, Value]) -> TrainObserver:
        del values
        stop, inner = self.place[1] if number == self.place[0] else None, SilentObserver()

        class Stops(SilentObserver):
            def on_step(self, step: int, loss: float) -> None:
                inner.on_step(step, loss)
                if step == stop:
                    raise KeyboardInterrupt

        return Stops()


@pytest.mark.slow
def test_the_best_trials_adapter_is_that_of_a_plain_run_and_its_table_and_picture_lie_beside_it(tmp_path: Path) -> None:
    base = make_bases(tmp_path / "bases")["bert"]
    settings = topics(tmp_path, base).changed(epochs=2)
    space: Space = {"learning_rate": Range(1e-3, 5e-2, log=True), "rank": Choice((2, 4))}
    with pytest.raises(KeyboardInterrupt):
        search(settings, space, 2, StopsIn(2, step=8))  # in the second epoch: its checkpoint is kept
    trial = search_path(settings.run.out) / "trial-2" / "topics"
    assert run_path(trial).is_dir()
    arguments = ["classify", "--base", base, "--train", str(settings.data.train), "--valid", str(settings.data.valid)]
    arguments += [
        "--out",
        str(settings.run.out),
        "--max-length",
        "16",
        "--rank",
        "4",
        "--dropout",
        "0",
        "--threads",
        "1",
    ]
    arguments += ["--learning-rate", "2e-2", "--epochs", "2", "--search", "trials=2"]
    spaces = [f"{name}={values}" for name, values in space.items()]
    fixed = ["dropout=0", "scheduler=linear", "batch_size=16"]
    refused = CliRunner().invoke(train_app, [*arguments, *(f"--search-space={text}" for text in spaces)])
    assert refused.exit_code == 1
    assert "another file, or remove that one" in " ".join(refused.stderr.split())
    done = search(settings.changed(report=True), space, 2)
    assert [one.state for one in done.trials] == [TrialState.FINISHED] * 2
    alone = settings.changed(out=tmp_path / "alone" / "topics")
    train(applied(alone, done.best.values))
    names = tuple(sorted(FILES - {"multilora.json"}))
    assert file_digests(settings.run.out, names) == file_digests(alone.run.out, names)
    text = (settings.run.out / "search.md").read_text()
    rows = re.findall(r"^\| (\d) \| finished \| ([\d.]+) % .*?(\*\*best\*\*)? \|$", text, re.MULTILINE)
    assert [(int(number), float(value)) for number, value, _ in rows] == [
        (one.number, round(100 * (one.metric or 0), 1)) for one in done.trials
    ]
    assert [int(number) for number, _, mark in rows if mark] == [done.best.number]
    assert (settings.run.out / "search.png").read_bytes().startswith(b"\x89PNG")
    report = CliRunner().invoke(
        train_app,
        [*arguments, "--overwrite", "--search-storage", str(tmp_path / "new.db"), "--no-report"]
        + [f"--search-space={text}" for text in (*spaces, *fixed)],
    )
    assert report.exit_code == 0, report.output
    assert re.search(r"trial 2/2  learning_rate [\d.e-]+  rank [24]  accuracy [\d.]+ %", report.output)
    assert "best of 2: trial" in report.output
