"""The servers that are measured: processes that can be held still while another one is measured."""

from __future__ import annotations

import signal
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from server.demo.process import ServerProcess


class BenchServer(ServerProcess):
    """`multilora serve` with the settings people get by default."""

    def __init__(self, base: str, root: Path, threads: int) -> None:
        super().__init__(base, root, threads)
        self.log = root.parent / f"{root.name}.log"

    @contextmanager
    def held_still(self) -> Generator[None]:
        """Without a cycle of the processor, as if it were not there."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    @property
    def arena_used_bytes(self) -> float:
        return self.sample("multilora_arena_used_bytes")

    def sample(self, series: str) -> float:
        """The value of one of its metrics."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as page:
            lines = page.read().decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{series} "))

    def rss_bytes(self) -> int:
        """Memory that its process has, 0 where the system does not say."""
        assert self._process is not None
        return rss_bytes(self._process.pid)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


def rss_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process (Linux), else 0."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), 0)
