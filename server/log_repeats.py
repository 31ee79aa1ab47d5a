"""Warnings that thousands of adapters share are logged for a few of them."""

from __future__ import annotations

import logging
import threading
from collections import Counter

_MAX_TEXTS = 1000


class RepeatsFilter(logging.Filter):
    """For loggers whose records are (adapter, warning): each warning passes `limit` times, the last with a hint."""

    def __init__(self, limit: int = 3) -> None:
        super().__init__()
        self._limit = limit
        self._seen: Counter[object] = Counter()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.args, tuple) or len(record.args) != 2:
            return True
        with self._lock:
            if len(self._seen) >= _MAX_TEXTS:
                self._seen.clear()
            self._seen[record.args[1]] += 1
            times = self._seen[record.args[1]]
        if times == self._limit:
            hint = "(not logged for further adapters; `multilora adapters inspect` shows it)"
            record.msg, record.args = f"{record.getMessage()} {hint}", ()
        return times <= self._limit
