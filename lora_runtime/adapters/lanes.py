"""Threads for work that must not wait behind other work: a lane runs its jobs in order, and lanes run side by side."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class Lane:
    """A few daemon threads with one queue, started when they are first needed.

    `niceness` (Linux) lets the threads that answer requests run first where cores are few.
    """

    def __init__(self, name: str, num_threads: int, niceness: int = 0) -> None:
        self._name = name
        self._num_threads = num_threads
        self._niceness = niceness
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stopped = False

    def submit(self, job: Job) -> None:
        """Run `job`, which must not raise, after those before it. Once stopped, jobs are dropped."""
        self._jobs.put(job)
        if len(self._threads) < self._num_threads and not self._stopped:
            thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Drop queued jobs and wait for running ones; whether all ended in time. Those that did not end as daemons."""
        self._stopped = True
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        if self._niceness and sys.platform == "linux":
            self._let_others_first()
        while (job := self._jobs.get()) is not None:
            if not self._stopped:
                job()

    def _let_others_first(self) -> None:
        """A process that is nicer already stays so: only root may take that back. A sandbox may forbid it at all."""
        thread = threading.get_native_id()
        try:
            if os.getpriority(os.PRIO_PROCESS, thread) < self._niceness:
                os.setpriority(os.PRIO_PROCESS, thread, self._niceness)
        except OSError as error:
            logger.warning("%s: its threads keep their priority: %s", self._name, error.strerror)
