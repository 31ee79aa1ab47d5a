"""The servers that are measured: `multilora serve` with the auth file, one at a time awake."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager

from server.bench.adapters.servers import BenchServer
from server.bench.tenants.site import Site

ADMITTED = "multilora_admitted_sequences"
_EMPTY_WITHIN_S = 30.0
_WATCHED = "from server.bench.tenants.watched_app import main; main()"


class TenantServer(BenchServer):
    """With an auth file, and the gauges of `watched_app.py`, which are read at scrapes alone."""

    def __init__(self, base: str, site: Site, threads: int, name: str, *flags: str) -> None:
        super().__init__(base, site.root, threads)
        self.name = name
        self.log = site.root.parent / f"{name}.log"
        self._command[self._command.index("--auth") + 1] = str(site.auth)
        self._command[self._command.index("-c") + 1] = _WATCHED
        self._command += flags

    def wait_empty(self) -> float:
        """Until nothing is admitted; the seconds that took. TimeoutError when something stays."""
        started = time.monotonic()
        while self.sample(ADMITTED):
            if time.monotonic() - started > _EMPTY_WITHIN_S:
                raise TimeoutError(f"{self.name}: {self.sample(ADMITTED):.0f} sequences are held for good")
            time.sleep(0.02)
        return time.monotonic() - started


@contextmanager
def started(servers: Iterable[TenantServer]) -> Generator[list[TenantServer]]:
    """All of them, one after the other, so that none starts while another one loads its base."""
    with ExitStack() as stack:
        yield [stack.enter_context(server) for server in servers]


@contextmanager
def alone(chosen: TenantServer, servers: Iterable[TenantServer]) -> Generator[TenantServer]:
    """One of them, while the others get no cycle of the processor."""
    with ExitStack() as stack:
        for server in servers:
            if server is not chosen:
                stack.enter_context(server.held_still())
        yield chosen
