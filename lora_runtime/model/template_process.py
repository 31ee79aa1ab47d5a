"""Chat templates of adapters, rendered in a process of their own: see `template_renderer.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lora_runtime.errors import CapacityExceeded
from lora_runtime.model import template_renderer
from lora_runtime.model.template_renderer import MAX_BYTES, MAX_CPU_S, MAX_RENDERED_CHARS

MAX_WAIT_S = 10.0  # for the renders of others
MAX_START_S = 30.0  # until an answer, of a process that may have to start first
_MAX_REPLY_BYTES = 256 << 20
_STOPPED = f"took more than {MAX_CPU_S:g} s of processor time or {MAX_BYTES >> 20} MiB of memory, and was stopped"


class RenderFailed(Exception):
    """The template failed on conversation `index`; `reason` quotes no request."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason


class TemplateProcess:
    """Thread-safe. The process starts with the first render, and again after one that was stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def render(
        self, template: str, conversations: Sequence[Sequence[Mapping[str, str]]], tokens: Mapping[str, str]
    ) -> list[str]:
        """The text of each conversation; `tokens` are the special tokens by name, as templates know them.

        Blocks for up to a second of the template's processor time, and a second or two for a start. Raises
        RenderFailed, and CapacityExceeded when renders of others do not end in time.
        """
        request = {"template": template, "conversations": [list(turns) for turns in conversations], "tokens": tokens}
        data = json.dumps(request, default=dict).encode()
        if not self._lock.acquire(timeout=MAX_WAIT_S):
            raise CapacityExceeded("the chat templates of other adapters take all the time there is for them")
        try:
            answer = self._exchange(data)
        finally:
            self._lock.release()
        return _texts(answer, len(conversations))

    def close(self) -> None:
        """End the process; a later render starts another."""
        with self._lock:
            self._stop()

    def _exchange(self, data: bytes) -> object:
        if self._running is None or self._running.process.poll() is not None:
            self._stop()
            self._running = _Running()
        connection = self._running.connection
        try:
            connection.send_bytes(data)
            if connection.poll(MAX_START_S):
                return json.loads(connection.recv_bytes(_MAX_REPLY_BYTES))
        except (EOFError, OSError, ValueError):  # it was stopped, or says what no renderer says
            pass
        self._stop()
        return None

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None


class _Running:
    """One process; it goes with this object, or with the interpreter."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
        # nothing else of the environment: it may hold secrets
        environment = {**kept, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(Path(template_renderer.__file__)), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
            )
        self.connection: Connection = Connection(ours.detach())
        self.stop = weakref.finalize(self, _end, self.process, self.connection)


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    with suppress(OSError):
        connection.close()
    process.kill()
    process.wait()


def _texts(answer: Any, num_conversations: int) -> list[str]:
    match answer:
        case {"texts": [*texts]} if len(texts) == num_conversations and all(isinstance(text, str) for text in texts):
            return texts
        case {"index": int(index), "reason": str(reason)} if 0 <= index < num_conversations:
            raise RenderFailed(index, reason)
        case _:
            raise RenderFailed(0, _STOPPED)


def check_rendered(text: str, index: int) -> str:
    """`text` of conversation `index`, which is at most 2^20 characters long."""
    if len(text) > MAX_RENDERED_CHARS:
        raise RenderFailed(index, f"made more than {MAX_RENDERED_CHARS} characters")
    return text
