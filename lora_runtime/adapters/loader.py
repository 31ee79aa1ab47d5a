"""The loader threads: they fetch, read, validate and copy, and tell the engine by messages. They touch no queue.

Four lanes, so that nothing slow stands before something fast: downloads, reading, decompositions (PiSSA and others,
seconds long), and the examination of folders that nobody has asked for yet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.checkpoint import Checkpoint, read_planned
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.image import ImageLayout, plan_image, write_image
from lora_runtime.adapters.lanes import Lane
from lora_runtime.adapters.plan import AdapterPlan, plan_adapter, read_card
from lora_runtime.adapters.sources.api import Origin
from lora_runtime.adapters.transfer import copy_image
from lora_runtime.arena import ALayout
from lora_runtime.errors import AdapterRejected, LoadCancelled, MultiloraError
from lora_runtime.types import AdapterCard, AdapterId

logger = logging.getLogger(__name__)

_NUM_DOWNLOADS = 4
_NICENESS = 5
_STOP_S = 2.0
_EXAMINE_REST = 3.0  # seconds of rest for each second of examining while requests are answered


class Lease(Protocol):
    """Files that stay where they are until it is released."""

    @property
    def path(self) -> Path: ...

    def release(self) -> None: ...


class Fetching(Protocol):
    """`sources.fetch.Fetcher`."""

    def open(self, origin: Origin, stop: threading.Event) -> Lease: ...


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of the operator's: it is read where it is."""

    path: Path

    def release(self) -> None: ...


class LocalFolders:
    """Fetches nothing: local folders alone."""

    def open(self, origin: Origin, stop: threading.Event) -> LocalFolder:
        del stop
        if origin.path is None:
            message = "is a URL, and no cache folder is set to fetch it into; give one, or copy the adapter to a folder"
            raise AdapterRejected("SOURCE_UNSUPPORTED", origin.url, message)
        return LocalFolder(origin.path)


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of a version from before, which its files must still say; None: not known."""

    digest: str | None
    card: AdapterCard | None

    def check(self, adapter: AdapterId, checkpoint: Checkpoint) -> None:
        """Raise AdapterRejected when the files changed: requests were matched and tokenised by the known card."""
        known, found = self.card, checkpoint.card
        other = known is not None and (known.task, known.tokenizer_sha256) != (found.task, found.tokenizer_sha256)
        if other or (self.digest is not None and self.digest != checkpoint.digest):
            changed = "its files changed since it was registered; a version is immutable, register a new one"
            raise AdapterRejected("CHANGED", str(adapter), changed)


@dataclass(frozen=True, slots=True)
class LoadJob:
    """A load: `run` is where the image goes, if its size was known before."""

    adapter: AdapterId
    origin: Origin
    expected: Expected
    run: torch.Tensor | None
    stop: threading.Event


@dataclass(frozen=True, slots=True)
class CardRead:
    adapter: AdapterId
    outcome: AdapterCard | MultiloraError


@dataclass(frozen=True, slots=True)
class Fetched:
    """Validated and laid out; with `writing` the same thread goes on to write it."""

    adapter: AdapterId
    checkpoint: Checkpoint
    layout: ImageLayout
    lease: Lease
    writing: bool


@dataclass(frozen=True, slots=True)
class Written:
    """The image is complete in its run of the first tier."""

    adapter: AdapterId


@dataclass(frozen=True, slots=True)
class Copied:
    """The image is complete in its run of the device."""

    adapter: AdapterId


@dataclass(frozen=True, slots=True)
class LoadFailed:
    adapter: AdapterId
    error: MultiloraError


LoaderMessage = CardRead | Fetched | Written | Copied | LoadFailed


class AdapterLoader:
    """Every call returns at once, and ends in the messages it names, through `post`."""

    def __init__(
        self,
        base: BaseSpec,
        fetcher: Fetching,
        max_bytes: int,
        num_threads: int,
        post: Callable[[LoaderMessage], None],
        is_busy: Callable[[], bool] = lambda: False,
        a_layout: ALayout = ALayout.RANK_COLUMNS,
    ) -> None:
        """`is_busy`: whether requests are being answered, beside which examining takes a rest."""
        self._base = base
        self._fetcher = fetcher
        self._max_bytes = max_bytes
        self._post = post
        self._is_busy = is_busy
        self._a_layout = a_layout
        self._stopping = threading.Event()
        self._downloads = Lane("multilora-fetch", _NUM_DOWNLOADS, _NICENESS)
        self._reading = Lane("multilora-loader", num_threads, _NICENESS)
        self._decomposing = Lane("multilora-decompose", 1, 2 * _NICENESS)
        self._examining = Lane("multilora-examine", 1, 2 * _NICENESS)

    def examine(self, adapter: AdapterId, folder: Path, *, urgent: bool) -> None:
        """Read the JSON files and headers of a local folder → CardRead; those that are not urgent wait for others."""

        def examine() -> None:
            started = time.monotonic()
            try:
                outcome: AdapterCard | MultiloraError = read_card(folder, self._base, str(adapter))
            except Exception as error:  # noqa: BLE001 - told as it is
                outcome = _typed(adapter, error)
            self._post(CardRead(adapter, outcome))
            if not urgent and self._is_busy():
                self._stopping.wait(_EXAMINE_REST * (time.monotonic() - started))

        (self._reading if urgent else self._examining).submit(examine)

    def load(self, job: LoadJob) -> None:
        """→ Fetched, and Written if there is a run; or LoadFailed."""
        if job.origin.is_local:
            self._reading.submit(lambda: self._guard(job.adapter, lambda: self._read(job, self._open(job))))
        else:
            self._downloads.submit(lambda: self._guard(job.adapter, lambda: self._download(job)))

    def write(self, adapter: AdapterId, checkpoint: Checkpoint, layout: ImageLayout, run: torch.Tensor) -> None:
        """Write an image into `run` on the host, which nothing points to yet → Written or LoadFailed."""

        def write() -> None:
            write_image(checkpoint, layout, run)
            self._post(Written(adapter))

        self._reading.submit(lambda: self._guard(adapter, write))

    def copy(self, adapter: AdapterId, image: torch.Tensor, run: torch.Tensor) -> None:
        """Copy an image from the host into `run` on the device → Copied or LoadFailed."""

        def copy() -> None:
            copy_image(image, run)
            self._post(Copied(adapter))

        self._reading.submit(lambda: self._guard(adapter, copy))

    def stop(self) -> None:
        """Drop what is queued and wait a moment for what runs; its messages come too late to matter."""
        self._stopping.set()
        for lane in (self._downloads, self._reading, self._decomposing, self._examining):
            if not lane.stop(_STOP_S):
                logger.warning("a load is still running and ends with the process")

    def _open(self, job: LoadJob) -> Lease:
        lease = self._fetcher.open(job.origin, job.stop)
        if job.stop.is_set():
            lease.release()
            raise LoadCancelled(str(job.adapter))
        return lease

    def _download(self, job: LoadJob) -> None:
        lease = self._open(job)
        self._reading.submit(lambda: self._guard(job.adapter, lambda: self._read(job, lease)))

    def _read(self, job: LoadJob, lease: Lease) -> None:
        try:
            plan = plan_adapter(lease.path, self._base, Findings())
            assert plan is not None
            if any(module.residual for module in plan.modules):
                self._decomposing.submit(lambda: self._guard(job.adapter, lambda: self._finish(job, lease, plan)))
                return
        except BaseException:
            lease.release()
            raise
        self._finish(job, lease, plan)

    def _finish(self, job: LoadJob, lease: Lease, plan: AdapterPlan) -> None:
        try:
            checkpoint = read_planned(plan, self._base, self._max_bytes)
            job.expected.check(job.adapter, checkpoint)
            layout = plan_image(checkpoint, self._base.groups, self._a_layout)
            writing = job.run is not None and layout.num_elements <= job.run.numel()
        except BaseException:
            lease.release()
            raise
        self._post(Fetched(job.adapter, checkpoint, layout, lease, writing))
        if writing and job.run is not None:
            write_image(checkpoint, layout, job.run)
            self._post(Written(job.adapter))

    def _guard(self, adapter: AdapterId, work: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            work()
        except Exception as error:  # noqa: BLE001 - told as it is
            self._post(LoadFailed(adapter, _typed(adapter, error)))
        logger.debug("a stage of loading %s took %.4f s", adapter, time.monotonic() - started)


def _typed(adapter: AdapterId, error: Exception) -> MultiloraError:
    """A reason to keep: without its traceback, whose frames hold the files that were read."""
    if isinstance(error, MultiloraError):
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error
    if isinstance(error, OSError):
        where = Path(error.filename).name if error.filename else str(adapter)
        return AdapterRejected("FILES_UNREADABLE", where, error.strerror or type(error).__name__)
    logger.error("loading %s failed unexpectedly", adapter, exc_info=error)
    return MultiloraError(f"loading {adapter} failed: {type(error).__name__}")
