"""The one door into the engine thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from lora_runtime.errors import EngineStopped, MultiloraError
from lora_runtime.futures import settle

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Mailbox:
    """Actions from any thread, run by the owner in order. Once closed, nothing enters and nothing is lost."""

    def __init__(self) -> None:
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._closed = False

    def post(self, action: Callable[[], None]) -> bool:
        """Whether the action was taken; False once closed."""
        with self._door:
            if not self._closed:
                self._actions.put(action)
            return not self._closed

    def ask(self, action: Callable[[Future[T]], None]) -> Future[T]:
        """Post an action that settles the returned future, at once or later; what it raises goes into the future."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                action(future)
            except MultiloraError as error:
                settle(future, error)
            except Exception as error:
                logger.exception("an action in the engine thread failed")
                settle(future, MultiloraError(f"the engine could not do it: {type(error).__name__}"))

        if not self.post(run):
            settle(future, EngineStopped("the engine has stopped; ask another replica"))
        return future

    def run_pending(self, timeout_s: float) -> None:
        """Run what has arrived, waiting up to `timeout_s` for the first."""
        try:
            action = self._actions.get(block=timeout_s > 0, timeout=timeout_s or None)
            while True:
                action()
                action = self._actions.get_nowait()
        except queue.Empty:
            return

    def close(self) -> None:
        """Refuse what comes from now on, then run what came before; no failure of one keeps another from its turn."""
        with self._door:
            self._closed = True
        while not self._actions.empty():
            try:
                self.run_pending(0)
            except Exception:
                logger.exception("an action failed while the engine stopped")
