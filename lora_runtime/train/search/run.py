"""`search`: trials of `train`, and the best one's adapter where a single run would have written it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.writing import check_replaceable, staged_folder
from lora_runtime.errors import InvalidRequest
from lora_runtime.train.checkpoints import take_lock
from lora_runtime.train.processes import this_process
from lora_runtime.train.run import train
from lora_runtime.train.search.progress import (
    SearchObserver,
    SearchPlan,
    SearchReport,
    SilentSearchObserver,
    TrialReport,
    TrialState,
)
from lora_runtime.train.search.report import write_search_report
from lora_runtime.train.search.space import Space, check_space
from lora_runtime.train.search.store import Store, open_store, values_of
from lora_runtime.train.search.trial import run_trial, trial_folder, trial_settings
from lora_runtime.train.settings import TrainSettings
from lora_runtime.train.tasks import make_task

STORAGE_FILE = "search.db"


def search(
    settings: TrainSettings,
    space: Space,
    trials: int,
    observer: SearchObserver | None = None,
    *,
    timeout_s: float | None = None,
    storage: Path | None = None,
) -> SearchReport:
    """Run trials until there are `trials` of them, those of earlier calls included; write the best one's adapter.

    A trial is a run of `settings` with values drawn from `space`, compared by the metric of the task's best pass; one
    worse than the median of those before it is pruned, one that diverges is noted as failed. After `timeout_s` seconds
    no further trial starts. Trials are kept in `storage`, by default in a hidden folder beside `settings.run.out`: the
    same call goes on after an interruption, within the trial that was under way, and more `trials` add to a finished
    search. The same arguments give the same trials, where nothing ended by the clock.

    Raises InvalidRequest, on `search` when no trial finished; and what `train` raises for every trial alike.
    """
    run, started = settings.run, time.monotonic()
    _check(settings, space, trials, timeout_s)
    observer = observer or SilentSearchObserver()
    selection, more_is_better = make_task(settings).selection
    work = search_path(run.out)
    file = storage or work / STORAGE_FILE
    with _locked(work, run.out), open_store(file, settings, space, more_is_better=more_is_better) as store:
        plan = SearchPlan(space, trials, store.reports(), selection, more_is_better, file)
        observer.on_search(plan)
        one = _Search(settings, plan, store, observer, work)
        while one.next() and (timeout_s is None or time.monotonic() - started < timeout_s):
            pass
        return one.finish()


def search_path(out: Path) -> Path:
    """Where a search that writes `out` keeps its trials; no adapter's name begins with a dot."""
    out = out.absolute()
    return out.with_name(f".{out.name}.search")


class _Search:
    """What one call of `search` does in its folder."""

    def __init__(
        self, settings: TrainSettings, plan: SearchPlan, store: Store, observer: SearchObserver, work: Path
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._store = store
        self._observer = observer
        self._work = work

    def next(self) -> bool:
        """Run one more trial; False when there are enough."""
        trial = self._store.take(self._plan.num_trials)
        if trial is None:
            return False
        number, folder, started = trial.number + 1, trial_folder(self._work, trial.number + 1), time.monotonic()
        inner = self._observer.on_trial(number, values_of(trial))
        try:
            state, metric, reason = run_trial(self._settings, trial, folder, self._plan.selection, inner)
        finally:
            self._store.add_seconds(trial, time.monotonic() - started)
        report = self._store.end(trial, state, metric, reason)
        best = self._best()
        self._keep(best)
        self._observer.on_trial_end(report, best=best is not None and best.number == number)
        return True

    def finish(self) -> SearchReport:
        """Write `out`: the adapter of the best trial, trained once more where its folder is gone."""
        trials, best, run = self._store.reports(), self._best(), self._settings.run
        if best is None:
            raise InvalidRequest("search", f"none of {len(trials)} trials finished{_last_reason(trials)}")
        folder = trial_folder(self._work, best.number)
        if not (folder / run.out.name / CONFIG_FILE).is_file():
            again = trial_settings(self._settings, best.values, folder, best.number)
            train(again, self._observer.on_trial(best.number, best.values))
        report = SearchReport(run.out, self._plan, trials, best, sum(trial.seconds for trial in trials))
        with staged_folder(run.out, overwrite=run.overwrite) as staging:
            shutil.copytree(folder / run.out.name, staging, dirs_exist_ok=True)
            if run.report:
                write_search_report(staging, report)
        return report

    def _best(self) -> TrialReport | None:
        return self._plan.best(self._store.reports())

    def _keep(self, best: TrialReport | None) -> None:
        """The best trial's folder, and no other."""
        for folder in self._work.glob("trial-*"):
            if best is None or folder != trial_folder(self._work, best.number):
                shutil.rmtree(folder, ignore_errors=True)


def _check(settings: TrainSettings, space: Space, trials: int, timeout_s: float | None) -> None:
    if trials < 1:
        raise InvalidRequest("search", f"trials is {trials}; allowed: 1 or more")
    if timeout_s is not None and timeout_s <= 0:
        raise InvalidRequest("search", f"timeout is {timeout_s:g} seconds; allowed: more than 0")
    if settings.run.resume:
        raise InvalidRequest("resume", "is not for a search, which goes on by itself; leave it out")
    if this_process().count > 1:
        raise InvalidRequest("search", "runs in one process; start it without torchrun")
    if settings.privacy is not None:
        raise InvalidRequest("search", "is not for private training: every trial would spend an ε of its own")
    check_space(space, settings)
    check_replaceable(settings.run.out.absolute(), overwrite=settings.run.overwrite)


@contextmanager
def _locked(work: Path, out: Path) -> Generator[None]:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest("out", f"{work.parent} cannot be written ({error.strerror})") from error
    with (work / "lock").open("w") as lock:
        take_lock(lock.fileno(), out)
        try:
            yield
        finally:
            if len(list(work.iterdir())) == 1:  # the lock alone: nothing to go on with
                shutil.rmtree(work, ignore_errors=True)


def _last_reason(trials: tuple[TrialReport, ...]) -> str:
    reasons = [trial.reason for trial in trials if trial.state is TrialState.FAILED]
    return f"; the last one: {reasons[-1]}" if reasons else "; give it more time"
