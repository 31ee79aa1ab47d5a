"""TLS of the server; its files are looked at for every new connection, so that certificates renew without a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from server.tenancy.reload import Reloading

_log = logging.getLogger(__name__)


class TlsError(Exception):
    """Certificate, key or client CA cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What was read of the files."""

    configuration: grpc.ServerCertificateConfiguration
    expires_unix_s: float  # of the first certificate that ends


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Credentials, and when what they show expires."""

    credentials: grpc.ServerCredentials
    expires_unix_s: Callable[[], float]  # as the files are now


def server_tls(cert: Path, key: Path, client_ca: Path | None = None, require_client_cert: bool = False) -> ServerTls:
    """Credentials of PEM files that follow them: connections opened after a change use the new ones.

    A change that cannot be used (such as half of a pair) keeps the old files and is logged. Raises TlsError now.
    """
    if require_client_cert != (client_ca is not None):
        # gRPC for Python asks for certificates either never or always
        raise TlsError("client certificates need both or neither: a client CA, and that they are required")
    paths = [path for path in (cert, key, client_ca) if path is not None]
    files = Reloading(paths, lambda: _load(cert, key, client_ca), _keep)

    given = files.value

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake, from its own threads; None: as before."""
        nonlocal given
        files.poll()
        if files.value is given:
            return None
        given = files.value
        return given.configuration

    def expires_unix_s() -> float:
        files.poll()
        return files.value.expires_unix_s

    # the stubs deny the None that gRPC's documentation allows
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", changed)
    credentials = grpc.dynamic_ssl_server_credentials(given.configuration, fetcher, require_client_cert)
    return ServerTls(credentials, expires_unix_s)


def _load(cert: Path, key: Path, client_ca: Path | None) -> _Files:
    chain_pem, key_pem = _read(cert), _read(key)
    chain = _certificates(cert, chain_pem)
    _require_pair(cert, chain[0], key, key_pem)
    if chain[0].not_valid_after_utc <= datetime.now(UTC):
        _log.warning("%s: has expired, so clients will refuse it; renew it", cert)
    roots = None
    if client_ca is not None:
        roots = _read(client_ca)
        _certificates(client_ca, roots)
    configuration = grpc.ssl_server_certificate_configuration([(key_pem, chain_pem)], roots)
    return _Files(configuration, min(one.not_valid_after_utc.timestamp() for one in chain))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{path}: cannot be read ({error.strerror}); name a PEM file") from error


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise TlsError(f"{path}: has no certificate that can be read; name a PEM file") from error


def _require_pair(cert: Path, leaf: x509.Certificate, key: Path, key_pem: bytes) -> None:
    try:
        private = load_pem_private_key(key_pem, password=None)
    except TypeError as error:
        raise TlsError(f"{key}: is encrypted; gRPC needs it without a password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TlsError(f"{key}: is no private key that can be read; name a PEM file") from error
    encoding = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*encoding) != leaf.public_key().public_bytes(*encoding):
        raise TlsError(f"{key}: is not the key of {cert}; renew both together")


def _keep(error: Exception) -> None:
    _log.error("TLS: what was read before stays in use: %s", error)
