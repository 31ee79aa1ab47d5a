"""TLS and client certificates, as callers meet them: whose certificate counts, and files that are renewed."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.tenancy.identity import Identity
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, classify_request, running
from tests.service.tenants import (
    CHANGES,
    INFERENCE,
    READS,
    Caller,
    Door,
    code_of,
    make_door,
    reflection_code,
    request_for,
    until,
)
from tests.unit.tenancy_certificates import client_certificate, spiffe, write_server_certificate

DENIED = grpc.StatusCode.UNAUTHENTICATED
OK = grpc.StatusCode.OK
FORBIDDEN = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapters" / "acme" / "news" / "1", labels=["a", "b"])
    return tmp_path / "adapters"


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return make_door(tmp_path / "door")


def secure(server: Harness, ca: trustme.CA, client: tuple[bytes, bytes] | None = None) -> aio.Channel:
    """A connection of its own."""
    key, chain = client or (None, None)
    credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes(), key, chain)
    options = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.ssl_target_name_override", "localhost"),
    )
    return aio.secure_channel(f"127.0.0.1:{server.app.port}", credentials, options)


@asynccontextmanager
async def with_tls(root: Path, folder: Path, ca: trustme.CA, **settings: Any) -> AsyncGenerator[Harness]:
    write_server_certificate(ca, folder)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Identity.run, "__defaults__", (0.02,))
        async with running(root, tls_cert=folder / "cert.pem", tls_key=folder / "key.pem", **settings) as server:
            yield server


async def ask(channel: aio.Channel, *headers: str) -> grpc.StatusCode:
    async with channel:
        return await code_of(Caller(channel, *headers)("Classify", classify_request("news", "x"), timeout=10))


async def test_keys_come_over_tls_and_a_renewed_certificate_is_used(root: Path, door: Door) -> None:
    ca, next_ca = trustme.CA(), trustme.CA()
    header = door.key("acme")
    async with with_tls(root, door.folder, ca, auth=door.auth) as server:
        assert await ask(secure(server, ca), header) is OK
        assert await ask(secure(server, ca)) is DENIED
        assert await ask(aio.insecure_channel(f"127.0.0.1:{server.app.port}"), header) is grpc.StatusCode.UNAVAILABLE
        write_server_certificate(next_ca, door.folder)
        assert await ask(secure(server, next_ca), header) is OK
        assert await ask(secure(server, ca), header) is grpc.StatusCode.UNAVAILABLE


async def test_a_client_certificate_names_the_tenant(root: Path, door: Door) -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    door.write("[mtls]", 'roles = ["infer"]', 'trust_domain = "example.org"')
    header = door.key("bolt")
    ours = client_certificate(ca, None, spiffe("spiffe://example.org/tenant/acme/web"))
    named = client_certificate(ca, "acme")
    elsewhere = client_certificate(ca, "acme", spiffe("spiffe://evil.org/tenant/acme/web"))
    nobody = client_certificate(ca, "a b")
    expired = client_certificate(ca, "acme", expired=True)
    forged = client_certificate(stranger, "acme")
    settings = {"auth": door.auth, "tls_client_ca": door.folder / "ca.pem", "health": "authenticated"}
    async with with_tls(root, door.folder, ca, **settings) as server:
        for client in (ours, named):
            assert await ask(secure(server, ca, client)) is OK
            assert await ask(secure(server, ca, client), "Bearer wrong") is DENIED  # the token decides
            assert await ask(secure(server, ca, client), header) is grpc.StatusCode.NOT_FOUND  # bolt's `news`
            async with secure(server, ca, client) as channel:
                assert await code_of(Caller(channel)("LoadAdapter", request_for("LoadAdapter"))) is FORBIDDEN
                assert await reflection_code(channel) is OK
                assert await reflection_code(channel, "Bearer wrong") is DENIED
        for client in (elsewhere, nobody):
            assert await ask(secure(server, ca, client)) is DENIED
            async with secure(server, ca, client) as channel:
                assert await reflection_code(channel) is DENIED
                stub: Any = health_pb2_grpc.HealthStub(channel)
                assert await code_of(stub.Check(health_pb2.HealthCheckRequest())) is DENIED
                for method in (*INFERENCE, *CHANGES, *READS):
                    assert await code_of(Caller(channel)(method, request_for(method))) is DENIED
        for client in (expired, forged, None):
            assert await ask(secure(server, ca, client)) is grpc.StatusCode.UNAVAILABLE
        stranger.cert_pem.write_to_path(door.folder / "next.pem")
        os.replace(door.folder / "next.pem", door.folder / "ca.pem")  # another CA for clients, without a restart
        assert await ask(secure(server, ca, forged)) is OK
        assert await ask(secure(server, ca, ours)) is grpc.StatusCode.UNAVAILABLE


async def test_roles_of_certificates_change_without_a_restart(root: Path, door: Door) -> None:
    ca = trustme.CA()
    door.write("[mtls]", 'roles = ["infer", "adapters"]')
    settings = {"auth": door.auth, "tls_client_ca": door.folder / "ca.pem"}
    load = request_for("LoadAdapter", wait=True)
    async with (
        with_tls(root, door.folder, ca, **settings) as server,
        secure(server, ca, client_certificate(ca, "acme")) as channel,
    ):
        caller = Caller(channel)
        assert await code_of(caller("LoadAdapter", load)) is OK
        door.write("[mtls]")

        async def is_forbidden() -> bool:
            return await code_of(caller("LoadAdapter", load)) is FORBIDDEN

        await until(is_forbidden)
        assert await code_of(caller("Classify", classify_request("news", "x"))) is OK
