"""What was given before the command, for whoever opens a connection; without gRPC, which `inspect` does not need."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TypedDict


class Given(TypedDict, total=False):
    """The fields of `credentials.Credentials`."""

    token_file: Path | None
    tls: bool
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None


given: ContextVar[Given | None] = ContextVar("given", default=None)
