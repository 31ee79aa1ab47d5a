"""`multilora serve`, with gauges of what is held inside, so that a leak is seen from without.

Run as the command line is: `watched_app.main()` with `serve …` in argv.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Gauge

import server.app as server_app
from lora_runtime.engine import Engine
from server.app import App
from server.cli import app as command_line
from server.settings import ServeSettings
from server.startup import BackendFactory, load_runtime
from server.tenancy.limits import TenantLimits

OPEN_TICKETS = "bench_open_tickets"
HELD_REQUESTS = "bench_held_requests"
HELD_SEQUENCES = "bench_held_sequences"


class WatchedApp(App):
    """The server as it is, and three gauges read at each scrape."""

    def __init__(self, settings: ServeSettings, factory: BackendFactory = load_runtime) -> None:
        super().__init__(settings, factory)
        limits = self._tenancy.limits
        self._watch(OPEN_TICKETS, "Requests in the engine without their reply.", self._open_tickets)
        self._watch(HELD_REQUESTS, "Requests that tenants hold, all together.", lambda: _held(limits)[0])
        self._watch(HELD_SEQUENCES, "Sequences that tenants hold, all together.", lambda: _held(limits)[1])

    def _watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, registry=self._metrics.registry).set_function(value)

    def _open_tickets(self) -> float:
        if self._backend is None:
            return 0
        engine = self._backend.engine
        assert isinstance(engine, Engine), "this is the real server"
        return len(engine._scheduler.open_tickets())  # pyright: ignore[reportPrivateUsage]


def _held(limits: TenantLimits) -> tuple[int, int]:
    accounts = list(limits._accounts.values())  # pyright: ignore[reportPrivateUsage]
    return sum(account.num_requests for account in accounts), sum(account.num_sequences for account in accounts)


def main() -> None:
    server_app.App = WatchedApp  # pyright: ignore[reportAttributeAccessIssue]
    command_line()
