"""Python's garbage collector, kept from what lives as long as the process."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


def exempt_from_collection() -> None:
    """Take everything that is alive now out of all later collections; call it once, when everything is loaded.

    torch and transformers leave some 10^6 objects. Going through them takes a fifth of a second, in which no thread
    answers anybody, and Python does it again every few seconds of traffic.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def exempt_meanwhile() -> Generator[None]:
    """The same for a block of code, as a benchmark whose clients must not stop either."""
    exempt_from_collection()
    try:
        yield
    finally:
        gc.unfreeze()
