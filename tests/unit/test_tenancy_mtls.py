"""Client certificates as principals: from gRPC's auth context, and through a real handshake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509

from server.tenancy.auth_file import MtlsConfig
from server.tenancy.model import Principal, Role
from server.tenancy.mtls import principal_of_certificate
from server.tenancy.tls import server_tls
from tests.unit.tenancy_certificates import client_certificate, serving, spiffe, whoami, write_server_certificate

ACME = "spiffe://example.org/tenant/acme/workload/ci"


def context(names: Sequence[str] = (), common_name: str | None = None, **more: Sequence[bytes]) -> dict[str, Any]:
    return {
        "transport_security_type": [b"ssl"],
        "x509_subject_alternative_name": [name.encode() for name in names],
        "x509_common_name": [] if common_name is None else [common_name.encode()],
        **more,
    }


def tenant(auth_context: Mapping[str, Any], **settings: Any) -> str | None:
    principal = principal_of_certificate(auth_context, MtlsConfig.model_validate(settings))
    return None if principal is None else principal.tenant


def test_a_spiffe_uri_names_tenant_and_credential() -> None:
    config = MtlsConfig(roles=frozenset({Role.INFER, Role.ADAPTERS}))
    principal = principal_of_certificate(context(["ci.example.org", ACME], "ignored"), config)
    assert principal == Principal("acme", frozenset({Role.INFER, Role.ADAPTERS}), ACME)


def test_without_a_spiffe_uri_the_common_name_is_the_tenant() -> None:
    assert tenant(context(["acme.example.org"], "acme")) == "acme"
    assert tenant(context(["acme.example.org"], "acme"), tenant_from="spiffe") is None
    assert tenant(context([ACME], "beta"), tenant_from="cn") == "beta"


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://other.org/tenant/acme",
        "spiffe://example.org.evil/tenant/acme",
        "spiffe:///tenant/acme",
        "spiffe://example.org/tenant",
        "spiffe://example.org/tenant/",
        "spiffe://example.org//tenant/acme",
        "spiffe://example.org/tenants/acme",
        "spiffe://example.org/ns/tenant/acme",
        "spiffe://example.org/tenant/../acme",
        "spiffe://example.org/tenant/ac%6de",
        "spiffe://example.org/tenant/acme?x=1",
        "SPIFFE://example.org/tenant/acme",
        "spiffe://example.org/tenant/acmé",
        "spiffe://",
    ],
)
def test_a_spiffe_uri_that_is_not_accepted_is_not_rescued_by_the_common_name(uri: str) -> None:
    assert tenant(context([uri], "acme"), trust_domain="example.org") is None


def test_two_spiffe_uris_are_refused() -> None:
    assert tenant(context([ACME, "spiffe://example.org/tenant/beta"])) is None


def test_a_dns_name_cannot_pass_for_a_spiffe_uri() -> None:
    for kind in ("peer_dns", "peer_email"):
        assert tenant(context([ACME], **{kind: [ACME.encode()]}), tenant_from="spiffe") is None


def test_common_names_must_be_one_name() -> None:
    assert tenant(context(common_name="ACME Corp, Ltd")) is None
    assert tenant(context(x509_common_name=[b"acme", b"beta"])) is None
    assert tenant(context()) is None


def test_without_tls_there_is_no_certificate() -> None:
    assert tenant({}) is None
    assert tenant({**context([ACME]), "transport_security_type": [b"insecure"]}) is None
    assert tenant({"x509_common_name": [b"acme"]}) is None


async def test_a_real_server_knows_its_clients_and_refuses_those_of_another_ca(tmp_path: Path) -> None:
    server_ca, client_ca, stranger = trustme.CA(), trustme.CA(), trustme.CA()
    write_server_certificate(server_ca, tmp_path)
    client_ca.cert_pem.write_to_path(tmp_path / "clients.pem")
    credentials = server_tls(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "clients.pem", True).credentials
    config = MtlsConfig(trust_domain="example.org")

    def answer(call: Any) -> str:
        principal = principal_of_certificate(call.auth_context(), config)
        return "nobody" if principal is None else f"{principal.tenant} as {principal.name}"

    async with serving(credentials, answer) as port:
        good = client_certificate(client_ca, "ignored", spiffe(ACME))
        assert await whoami(port, server_ca, good) == f"acme as {ACME}"
        assert await whoami(port, server_ca, client_certificate(client_ca, "beta")) == "beta as beta"
        posing = client_certificate(client_ca, None, x509.DNSName(ACME))
        assert await whoami(port, server_ca, posing) == "nobody"
        for refused in (
            client_certificate(stranger, "acme", spiffe(ACME)),
            client_certificate(client_ca, "acme", spiffe(ACME), expired=True),
            (good[0], client_certificate(client_ca, "acme")[1]),  # of another key
            None,
        ):
            assert await whoami(port, server_ca, refused) == "UNAVAILABLE"
