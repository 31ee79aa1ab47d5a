"""Tokenising off the event loop, in a bounded number of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lora_runtime.types import TokenSequence
from server.backend import TextEncoder


class TokenizerPool:
    """Fast tokenizers release the GIL, so threads suffice; they are few because the engine needs the cores.

    What waits for a thread is bounded by admission, which comes first.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    async def encode(
        self,
        encoder: TextEncoder,
        inputs: Sequence[tuple[str, str | None]],
        *,
        max_length: int | None,
        truncate: bool,
    ) -> tuple[TokenSequence, ...]:
        """Token ids of each (text, text pair); raises TextTooLong on field `inputs[i].text`."""

        def work() -> tuple[TokenSequence, ...]:
            return encoder.encode(inputs, max_length=max_length, truncate=truncate)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Drop what waits for a thread and return without waiting for the rest."""
        self._threads.shutdown(wait=False, cancel_futures=True)
