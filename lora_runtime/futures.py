"""Giving a future its one outcome, from the thread that owes it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

from lora_runtime.errors import MultiloraError

T = TypeVar("T")


def settle(future: Future[T], outcome: T | MultiloraError) -> None:
    """Give a future its outcome; one that its caller has cancelled gets none."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, MultiloraError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
