"""What an interrupted run goes on from: checkpoints in a hidden folder beside `out`, gone when the run succeeded."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_runtime.errors import InvalidRequest, MultiloraError
from lora_runtime.train.progress import EvalReport
from lora_runtime.train.settings import RunSettings

HISTORY_FILE = "history.json"  # written last: a checkpoint without it is not whole
BEST_FILE = "best.safetensors"
_IDENTITY_FILE = "run.json"
_LOCK_FILE = "lock"


@dataclass(slots=True)
class History:
    """What a run did so far."""

    passes: list[EvalReport] = field(default_factory=list[EvalReport])
    step_losses: list[float] = field(default_factory=list[float])

    def write(self, path: Path) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> History:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return cls([EvalReport(**report) for report in content["passes"]], content["step_losses"])


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run in progress."""

    path: Path
    resumes: bool
    keeps: bool  # whether checkpoints are written at all

    def begin(self, identity: Mapping[str, str]) -> None:
        """Note what the run is, or check that it is the one to go on with; raises InvalidRequest on `resume`."""
        file = self.path / _IDENTITY_FILE
        if not self.resumes:
            file.write_text(json.dumps(dict(identity), indent=2) + "\n", encoding="utf-8")
            return
        before: Any = json.loads(file.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if before.get(name) != value:
                message = f"the interrupted run had {name} {before.get(name)}, this one has {value}"
                raise InvalidRequest("resume", f"{message}; give the same, or start over without resume")

    def checkpoint(self) -> Path | None:
        """The one to go on from; None at the start of a run."""
        return latest_checkpoint(self.path) if self.resumes else None


def run_path(out: Path) -> Path:
    """Where the checkpoints of a run that writes `out` are; no adapter's name begins with a dot."""
    out = out.absolute()
    return out.with_name(f".{out.name}.training")


def latest_checkpoint(path: Path) -> Path | None:
    """The last whole checkpoint of a run's folder."""
    whole = [file.parent for file in path.glob(f"checkpoint-*/{HISTORY_FILE}")]
    return max(whole, key=lambda found: int(found.name.partition("-")[2]), default=None)


def is_resumable(out: Path) -> bool:
    """Whether an interrupted run of `out` can be gone on with."""
    return latest_checkpoint(run_path(out)) is not None


@contextmanager
def run_folder(run: RunSettings, *, is_first: bool) -> Generator[RunFolder]:
    """The folder of a run, locked while the block runs; `is_first`: this process alone makes, locks and removes it.

    When the block raises, the folder stays only if a run can go on from it. Raises InvalidRequest on `resume` without
    anything to go on from, and on `out` when another run writes it or an interrupted one would be lost.
    """
    path = run_path(run.out)
    folder = RunFolder(path, run.resume, run.keep_checkpoints)
    if not is_first:
        yield folder
        return
    _check_resumption(run, path)
    path.mkdir(parents=True, exist_ok=True)
    with (path / _LOCK_FILE).open("w") as lock:
        take_lock(lock.fileno(), run.out)
        if not run.resume:
            _empty(path)
        keeps = False
        try:
            yield folder
        except BaseException as error:
            keeps = run.keep_checkpoints and not isinstance(error, MultiloraError)
            keeps = keeps and latest_checkpoint(path) is not None
            # what was refused because of its settings has done nothing to the checkpoints
            keeps = keeps or (run.resume and isinstance(error, InvalidRequest) and error.field == "resume")
            raise
        finally:
            if not keeps:
                shutil.rmtree(path, ignore_errors=True)


def _check_resumption(run: RunSettings, path: Path) -> None:
    resumable = latest_checkpoint(path) is not None
    if run.resume and not resumable:
        raise InvalidRequest("resume", f"there is no interrupted run of {run.out} to go on with; leave it out")
    if resumable and not run.resume and not run.overwrite:
        message = f"an interrupted run of {run.out} is kept beside it"
        raise InvalidRequest("out", f"{message}; go on with resume, or start over with overwrite")


def take_lock(lock: int, out: Path) -> None:
    """Lock an open file for whoever writes `out`; raises InvalidRequest on `out` when somebody else has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InvalidRequest("out", f"another run is training {out}; wait for it, or choose another folder") from None


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK_FILE:
            with suppress(OSError):
                entry.unlink()
