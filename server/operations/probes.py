"""What the probes of an orchestrator mean: live, a restart would not help; ready, requests are answered."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.backend import Backend
from server.rpc.health import Health, Phase


class Probes:
    """Asked from any thread; nothing here waits for the engine."""

    def __init__(self, health: Health, backend: Callable[[], Backend | None], stall_s: float) -> None:
        """`stall_s`: after so long without a turn of the engine's loop the process is taken for dead."""
        self._health = health
        self._backend = backend
        self._stall_s = stall_s

    @property
    def phase(self) -> Phase:
        return self._health.phase

    def why_not_live(self) -> str | None:
        """None while the engine's loop turns, and while there is none: a base that loads takes its time."""
        backend = self._backend()
        if backend is None or self.phase is Phase.DRAINING:
            return None
        if backend.engine.ended.done():
            return "the engine has ended; the log has the cause"
        stalled_s = time.monotonic() - backend.engine.stats().turned_at
        if stalled_s > self._stall_s:
            return f"the engine's loop has not turned for {stalled_s:.0f} s"
        return None

    def why_not_ready(self) -> str | None:
        """None while requests are answered: not before the base and the preloads are there, nor once it drains."""
        if self.phase is not Phase.SERVING:
            return f"the server is {self.phase}"
        return self.why_not_live()
