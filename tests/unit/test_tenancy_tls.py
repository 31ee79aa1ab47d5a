"""TLS files: refused by name at the start, followed later, and a broken change costs nobody a connection."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from server.tenancy.tls import TlsError, server_tls
from tests.unit.tenancy_certificates import client_certificate, serving, whoami, write_server_certificate
from tests.unit.tenancy_tokens import rsa_key


@pytest.fixture
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def folder(tmp_path: Path, ca: trustme.CA) -> Path:
    write_server_certificate(ca, tmp_path)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path


def test_files_that_cannot_be_used_are_named(folder: Path) -> None:
    cert, key, ca = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
    absent, text, encrypted = folder / "absent.pem", folder / "text.pem", folder / "encrypted.pem"
    text.write_text("hello")
    password = BestAvailableEncryption(b"secret")
    encrypted.write_bytes(rsa_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password))
    cases = [
        ((absent, key, None, False), "absent.pem: cannot be read"),
        ((cert, absent, None, False), "absent.pem: cannot be read"),
        ((text, key, None, False), "text.pem: has no certificate"),
        ((cert, text, None, False), "text.pem: is no private key"),
        ((cert, encrypted, None, False), "encrypted.pem: is encrypted"),
        ((ca, key, None, False), "key.pem: is not the key of"),
        ((cert, key, text, True), "text.pem: has no certificate"),
        ((cert, key, None, True), "both or neither"),
        ((cert, key, ca, False), "both or neither"),
    ]
    for arguments, message in cases:
        with pytest.raises(TlsError, match=message):
            server_tls(*arguments)


async def test_a_renewed_certificate_is_served_without_a_restart(
    folder: Path, ca: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    next_ca = trustme.CA()
    (folder / "next").mkdir()
    write_server_certificate(next_ca, folder / "next")
    async with serving(server_tls(folder / "cert.pem", folder / "key.pem").credentials, lambda _: "ok") as port:
        assert await whoami(port, ca) == "ok"
        assert await whoami(port, next_ca) == "UNAVAILABLE"
        with caplog.at_level(logging.ERROR):
            (folder / "next" / "cert.pem").replace(folder / "cert.pem")  # half of the pair
            assert await whoami(port, ca) == "ok"
            assert await whoami(port, ca) == "ok"
        assert caplog.text.count("key.pem: is not the key of") == 1
        (folder / "next" / "key.pem").replace(folder / "key.pem")
        assert await whoami(port, next_ca) == "ok"
        assert await whoami(port, ca) == "UNAVAILABLE"
        (folder / "key.pem").write_text("")
        assert await whoami(port, next_ca) == "ok"


async def test_no_call_fails_while_certificates_change_under_load(folder: Path, ca: trustme.CA) -> None:
    (folder / "next").mkdir()
    answers: list[str] = []
    stop = asyncio.Event()

    async def call(port: int) -> None:
        while not stop.is_set():
            answers.append(await whoami(port, ca))

    async with serving(server_tls(folder / "cert.pem", folder / "key.pem").credentials, lambda _: "ok") as port:
        callers = [asyncio.create_task(call(port)) for _ in range(4)]
        for _ in range(10):
            write_server_certificate(ca, folder / "next")
            for name in ("key.pem", "cert.pem"):  # one by one: each renewal passes through a pair that does not fit
                (folder / "next" / name).replace(folder / name)
                await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*callers)
    assert len(answers) > 10
    assert set(answers) == {"ok"}


async def test_a_new_client_ca_takes_over(folder: Path, ca: trustme.CA) -> None:
    next_ca = trustme.CA()
    credentials = server_tls(folder / "cert.pem", folder / "key.pem", folder / "ca.pem", True).credentials
    async with serving(credentials, lambda _: "ok") as port:
        old, new = client_certificate(ca, "acme"), client_certificate(next_ca, "acme")
        assert (await whoami(port, ca, old), await whoami(port, ca, new)) == ("ok", "UNAVAILABLE")
        next_ca.cert_pem.write_to_path(folder / "ca.pem")
        assert (await whoami(port, ca, old), await whoami(port, ca, new)) == ("UNAVAILABLE", "ok")


async def test_an_expired_certificate_is_warned_about(
    folder: Path, ca: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    key, cert = client_certificate(ca, "localhost", expired=True)
    (folder / "key.pem").write_bytes(key)
    (folder / "cert.pem").write_bytes(cert)
    server_tls(folder / "cert.pem", folder / "key.pem")
    assert "cert.pem: has expired" in caplog.text
