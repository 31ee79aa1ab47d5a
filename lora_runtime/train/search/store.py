"""The trials of one search, kept by Optuna in an SQLite file, so that the same search can go on."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_runtime.errors import InvalidRequest, MultiloraError, first_line
from lora_runtime.train.search.progress import TrialReport, TrialState
from lora_runtime.train.search.space import PARAMETERS, Choice, Space, Value, is_searched
from lora_runtime.train.settings import TrainSettings

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

STORAGE_FIELD = "search_storage"
_STUDY = "multilora"
_IDENTITY, _SECONDS, _REASON, _VALUES = "identity", "seconds", "reason", "values"
_LOCK_WAIT_S = 30.0  # SQLite's, for another reader of the file
_STRIDE = 1_000_003  # between the seeds of two searches, so that their trials share none
NUM_RANDOM = 10  # trials drawn at random before the sampler learns from them
FIRST_PRUNED = 2  # the validation pass that a trial may be pruned at: the first one mostly shows the warm-up
NUM_UNPRUNED = 5  # trials that are finished before one is pruned


class Store:
    """One search. Trials are numbered from 1."""

    def __init__(self, study: Study, space: Space, seed: int) -> None:
        self._study = study
        self._space = space
        self._seed = seed

    def reports(self) -> tuple[TrialReport, ...]:
        """Every trial so far, in order."""
        return tuple(self._report(trial) for trial in self._study.get_trials(deepcopy=False))

    def has_ended_trials(self) -> bool:
        """Whether any came to an end of its own."""
        return any(report.state is not TrialState.INTERRUPTED for report in self.reports())

    def take(self, limit: int) -> Trial | None:
        """The trial that was interrupted, else a new one unless there are `limit`.

        Each is drawn from a generator of its own, so an interrupted search draws what a whole one would have.
        """
        from optuna.samplers import TPESampler
        from optuna.trial import Trial
        from optuna.trial import TrialState as Kind

        trials = self._study.get_trials(deepcopy=False)
        seed = (self._seed * _STRIDE + len(trials)) % 2**32
        self._study.sampler = TPESampler(seed=seed, n_startup_trials=NUM_RANDOM)
        for frozen in trials:
            if frozen.state is Kind.RUNNING:  # this process alone runs trials: see the lock in `run.py`
                trial = Trial(self._study, frozen._trial_id)  # pyright: ignore[reportPrivateUsage] - has no public name
                break
        else:
            if len(trials) >= limit:
                return None
            trial = self._study.ask()
        trial.set_user_attr(_VALUES, self._draw(trial))
        return trial

    def end(self, trial: Trial, state: TrialState, metric: float | None, reason: str = "") -> TrialReport:
        """Note how it ended."""
        from optuna.trial import TrialState as Kind

        kinds = {TrialState.FINISHED: Kind.COMPLETE, TrialState.PRUNED: Kind.PRUNED, TrialState.FAILED: Kind.FAIL}
        if reason:
            trial.set_user_attr(_REASON, reason)
        self._study.tell(trial.number, metric if state is TrialState.FINISHED else None, kinds[state])
        return self.reports()[trial.number]

    def add_seconds(self, trial: Trial, seconds: float) -> None:
        """It ran for so long; call it before `end`."""
        trial.set_user_attr(_SECONDS, trial.user_attrs.get(_SECONDS, 0.0) + seconds)

    def _draw(self, trial: Trial) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for name, span in self._space.items():
            if isinstance(span, Choice):
                chosen = trial.suggest_categorical(name, span.values) if is_searched(span) else span.values[0]
                values[name] = cast(Value, chosen)
            elif span.whole:
                values[name] = trial.suggest_int(name, int(span.low), int(span.high), log=span.log)
            else:
                values[name] = span.rounded(trial.suggest_float(name, span.low, span.high, log=span.log))
        return values

    def _report(self, trial: FrozenTrial) -> TrialReport:
        passes = [value for value in trial.intermediate_values.values() if math.isfinite(value)]
        best = max if self._study.direction.name == "MAXIMIZE" else min
        metric = trial.value if trial.value is not None else best(passes, default=None)
        attributes = trial.user_attrs
        seconds, reason = float(attributes.get(_SECONDS, 0.0)), str(attributes.get(_REASON, ""))
        state = _states()[trial.state.name]
        return TrialReport(
            trial.number + 1, state, values_of(trial), metric, len(trial.intermediate_values), seconds, reason
        )


def values_of(trial: Trial | FrozenTrial) -> dict[str, Value]:
    """What a trial of `Store.take` is run with."""
    return dict(trial.user_attrs.get(_VALUES, {}))


def _states() -> Mapping[str, TrialState]:
    return {
        "COMPLETE": TrialState.FINISHED,
        "PRUNED": TrialState.PRUNED,
        "FAIL": TrialState.FAILED,
        "RUNNING": TrialState.INTERRUPTED,
    }


@contextmanager
def open_store(path: Path, settings: TrainSettings, space: Space, *, more_is_better: bool) -> Generator[Store]:
    """Begin a search in the file, or go on with the one that is in it.

    Raises InvalidRequest on `search` without Optuna, on `search_storage` when the file cannot be used or holds
    another search.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InvalidRequest("search", "needs Optuna: pip install 'multilora[search]'")
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it says of trials, the observer says
    try:
        storage, study = _open(path, more_is_better)
        is_useless = False
        try:
            _check_same(study, path, _identity(settings, space))
            store = Store(study, space, settings.run.seed)
            try:
                yield store
            except MultiloraError:
                is_useless = not store.has_ended_trials()
                raise
        finally:
            storage.engine.dispose()
            if is_useless:  # what is wrong with the first trial can then be put right
                path.unlink()
    finally:
        optuna.logging.set_verbosity(verbosity)


def _open(path: Path, more_is_better: bool) -> tuple[RDBStorage, Study]:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"connect_args": {"timeout": _LOCK_WAIT_S}}
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}", engine_kwargs=options)
        study = optuna.create_study(
            study_name=_STUDY,
            storage=storage,
            direction="maximize" if more_is_better else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=NUM_UNPRUNED, n_warmup_steps=FIRST_PRUNED),
            load_if_exists=True,
        )
    except (SQLAlchemyError, RuntimeError, OSError) as error:
        message = f"{path} cannot be used as an SQLite file of trials: {first_line(error)}"
        raise InvalidRequest(STORAGE_FIELD, f"{message}; name another") from error
    return storage, study


def _check_same(study: Study, path: Path, identity: Mapping[str, str]) -> None:
    before: Any = study.user_attrs.get(_IDENTITY)
    if before is None:
        study.set_user_attr(_IDENTITY, dict(identity))
        return
    for name in sorted(identity.keys() | before.keys()):
        if identity.get(name) != before.get(name):
            found = f"the search in {path} has {name} {before.get(name)}, this one has {identity.get(name)}"
            raise InvalidRequest(STORAGE_FIELD, f"{found}; give the same, name another file, or remove that one")


def _identity(settings: TrainSettings, space: Space) -> dict[str, str]:
    """What must agree for trials to be comparable: settings, the space, and the bytes of the rows."""
    varied = {PARAMETERS[name].field for name in space} | {"train", "valid"}
    found = {name: value for name, value in settings.decisive().items() if name not in varied}
    files = {"training rows": settings.data.train, "validation rows": settings.data.valid}
    found |= {name: "none" if path is None else f"sha256 {_digest(path)}" for name, path in files.items()}
    return found | {f"space of {name}": str(values) for name, values in space.items()}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
