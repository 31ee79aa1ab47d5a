"""How the command line shows who it is: a key or token, and TLS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

TOKEN_VARIABLE = "MULTILORA_TOKEN"
_MAX_TOKEN_BYTES = 8192


class CredentialsError(Exception):
    """A file of credentials cannot be used; the message names the option and the fault."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the options and variables say; files are read when a channel is opened."""

    token_file: Path | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def uses_tls(self) -> bool:
        return self.tls or any((self.tls_ca, self.tls_cert, self.tls_key))

    def channel(self, target: str, options: Any) -> grpc.Channel:
        """A channel that sends the token with every call. Raises CredentialsError."""
        if self.uses_tls:
            channel = grpc.secure_channel(target, self._tls(), options=options)
        else:
            channel = grpc.insecure_channel(target, options=options)
        token = self._token()
        return channel if token is None else grpc.intercept_channel(channel, _Authorization(token))

    def _tls(self) -> grpc.ChannelCredentials:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise CredentialsError("--tls-cert and --tls-key go together: name both or neither")
        parts = ("--tls-ca", self.tls_ca), ("--tls-key", self.tls_key), ("--tls-cert", self.tls_cert)
        roots, key, cert = (_read(option, path) for option, path in parts)
        return grpc.ssl_channel_credentials(roots, key, cert)

    def _token(self) -> str | None:
        if self.token_file is None:
            text = os.environ.get(TOKEN_VARIABLE, "").strip()
        else:
            text = (_read("--token-file", self.token_file) or b"").decode("ascii", "replace").strip()
        if not text:
            return None
        if not text.isascii() or not text.isprintable() or " " in text or len(text) > _MAX_TOKEN_BYTES:
            place = TOKEN_VARIABLE if self.token_file is None else f"--token-file {self.token_file}"
            raise CredentialsError(f"{place}: is no key or token: one line of printable ASCII without spaces is needed")
        return text


class _Authorization(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor
):
    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _with_header(self, details: Any) -> Any:
        return _Details(
            details.method,
            details.timeout,
            [*(details.metadata or ()), self._header],
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_header(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_header(client_call_details), request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(self._with_header(client_call_details), request_iterator)


@dataclass(frozen=True, slots=True)
class _Details(grpc.ClientCallDetails):
    method: Any
    timeout: Any
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


def _read(option: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{option}: {path} cannot be read: {error.strerror}") from error
