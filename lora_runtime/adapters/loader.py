"""The loader threads: they read, validate and copy, and tell the engine by messages. They touch no queue."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.checkpoint import Checkpoint, read_checkpoint
from lora_runtime.adapters.image import ImageLayout, plan_image, write_image
from lora_runtime.adapters.plan import read_card
from lora_runtime.errors import AdapterRejected, MultiloraError
from lora_runtime.types import AdapterCard, AdapterId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CardRead:
    adapter: AdapterId
    outcome: AdapterCard | MultiloraError


@dataclass(frozen=True, slots=True)
class Fetched:
    """Validated and laid out, in host memory."""

    adapter: AdapterId
    checkpoint: Checkpoint
    layout: ImageLayout


@dataclass(frozen=True, slots=True)
class Written:
    """The image is complete in its run."""

    adapter: AdapterId


@dataclass(frozen=True, slots=True)
class LoadFailed:
    adapter: AdapterId
    error: MultiloraError


LoaderMessage = CardRead | Fetched | Written | LoadFailed


class AdapterLoader:
    """A capped pool; every call returns at once and ends in exactly one message through `post`."""

    def __init__(self, base: BaseSpec, max_bytes: int, num_threads: int, post: Callable[[LoaderMessage], None]) -> None:
        self._base = base
        self._max_bytes = max_bytes
        self._post = post
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="multilora-loader")

    def read_card(self, adapter: AdapterId, folder: Path) -> None:
        """→ CardRead."""

        def read() -> LoaderMessage:
            try:
                return CardRead(adapter, read_card(folder, self._base))
            except MultiloraError as error:
                return CardRead(adapter, error)

        self._submit(adapter, read, lambda error: CardRead(adapter, error))

    def fetch(self, adapter: AdapterId, folder: Path) -> None:
        """→ Fetched or LoadFailed."""

        def fetch() -> LoaderMessage:
            checkpoint = read_checkpoint(folder, self._base, self._max_bytes)
            return Fetched(adapter, checkpoint, plan_image(checkpoint, self._base.groups))

        self._submit(adapter, fetch, lambda error: LoadFailed(adapter, error))

    def write(self, adapter: AdapterId, checkpoint: Checkpoint, layout: ImageLayout, run: torch.Tensor) -> None:
        """Copy into `run`, which no slot points to yet → Written or LoadFailed."""

        def write() -> LoaderMessage:
            write_image(checkpoint, layout, run)
            return Written(adapter)

        self._submit(adapter, write, lambda error: LoadFailed(adapter, error))

    def stop(self) -> None:
        """Let running calls end and drop the queued ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self,
        adapter: AdapterId,
        job: Callable[[], LoaderMessage],
        failed: Callable[[MultiloraError], LoaderMessage],
    ) -> None:
        def run() -> None:
            started = time.monotonic()
            try:
                message = job()
            except MultiloraError as error:
                message = failed(error)
            except OSError as error:
                where = Path(error.filename).name if error.filename else str(adapter)
                message = failed(AdapterRejected("FILES_UNREADABLE", where, error.strerror or type(error).__name__))
            except Exception as error:
                logger.exception("loading %s failed unexpectedly", adapter)
                message = failed(MultiloraError(f"loading {adapter} failed: {type(error).__name__}"))
            logger.debug("%s for %s took %.3f s", type(message).__name__, adapter, time.monotonic() - started)
            self._post(message)

        self._pool.submit(run)
