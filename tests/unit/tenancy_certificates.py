"""Certificates that trustme does not make, and a gRPC server that says who calls."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from grpc import aio


def client_certificate(
    ca: trustme.CA, common_name: str | None, *alternatives: x509.GeneralName, expired: bool = False
) -> tuple[bytes, bytes]:
    """Key and certificate as PEM, with alternative names of any kind."""
    key = ec.generate_private_key(ec.SECP256R1())
    root = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
    root_key: Any = load_pem_private_key(ca.private_key_pem.bytes(), None)
    names = [] if common_name is None else [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(names))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * day)
        .not_valid_after(now - day if expired else now + day)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    certificate = builder.sign(root_key, hashes.SHA256())
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        certificate.public_bytes(Encoding.PEM),
    )


def spiffe(uri: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(uri)


def write_server_certificate(ca: trustme.CA, folder: Path) -> None:
    """cert.pem and key.pem of localhost."""
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials, answer: Any) -> AsyncGenerator[int]:
    """A server whose one method answers with `answer(context)`, as text; gives its port."""

    async def handle(_: bytes, context: Any) -> bytes:
        return str(answer(context)).encode()

    server = aio.server()
    handlers = {"Whoami": grpc.unary_unary_rpc_method_handler(handle)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def whoami(
    port: int,
    ca: trustme.CA,
    client: tuple[bytes, bytes] | None = None,
    metadata: Sequence[tuple[str, str]] = (),
) -> str:
    """Ask over a connection of its own; the status code's name when that fails."""
    key, chain = client or (None, None)
    credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes(), key, chain)
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    async with aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
        call = channel.unary_unary("/test/Whoami")
        try:
            async with asyncio.timeout(20):
                return (await call(b"", metadata=tuple(metadata))).decode()
        except aio.AioRpcError as error:
            return error.code().name
