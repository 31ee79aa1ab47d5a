"""Work on texts off the event loop, in a bounded number of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class TokenizerPool:
    """Tokenises requests, and reads answers out of the model's outputs.

    Fast tokenizers and numpy release the GIL, so threads suffice; they are few because the engine needs the cores.
    What waits for a thread is bounded by admission, which comes first.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, run in one of the threads; a cancelled waiter drops work that has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Drop what waits for a thread and return without waiting for the rest."""
        self._threads.shutdown(wait=False, cancel_futures=True)
