"""A server of fake answers in a process of its own: `python -m tests.service.fake_server ROOT`; ends on SIGTERM.

It prints what `multilora serve` prints. For tests that need several servers, or kill one, and no model.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from server.app import App
from server.settings import ServeSettings
from tests.service.fake_runtime import FakeRuntime


async def serve(root: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    settings = ServeSettings(base="fake-base", auth="none", port=0, metrics_port=0, adapters=root)
    runtime = FakeRuntime()
    await App(settings, lambda _settings, _fetcher: runtime).run(stop, lambda text: print(text, flush=True))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
