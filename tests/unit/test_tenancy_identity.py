"""The auth file at work: each file is followed, and an issuer that is down takes nobody's keys away."""

from __future__ import annotations

import asyncio
import http.server
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from server.tenancy import jwks as jwks_module
from server.tenancy.auth_file import AuthFileError, JwksError, KeyFileError
from server.tenancy.authenticate import Unauthenticated
from server.tenancy.identity import Identity
from server.tenancy.jwks import JwksUrl, fetch_jwks
from server.tenancy.keys import KeyStore
from server.tenancy.model import Role
from tests.unit.tenancy_tokens import AUDIENCE, ISSUER, jwk_of, jwks, rsa_key, token

URL = "https://login.example/jwks"
KEYS = '[keys]\nfile = "keys.json"\n'


def jwt_table(where: str) -> str:
    return f'[jwt]\njwks = "{where}"\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\nalgorithms = ["RS256"]\n'


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {text}"),)


class Issuer:
    """A JWKS endpoint: what it answers with, whether it is up, and how often it was asked."""

    def __init__(self) -> None:
        self.document = jwks(jwk_of(rsa_key(), "rsa"))
        self.is_up = True
        self.num_fetches = 0
        self.hold = threading.Event()
        self.hold.set()

    def fetch(self, url: str) -> bytes:
        assert url == URL
        self.num_fetches += 1
        self.hold.wait(10)
        if not self.is_up:
            raise JwksError(f"{url}: cannot be fetched (refused)")
        return self.document


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the JWKS module's clock forward."""
    offset_s = [0.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + offset_s[0]

    monkeypatch.setattr(jwks_module, "time", Time)

    def forward(seconds: float) -> None:
        offset_s[0] += seconds

    return forward


def write(folder: Path, text: str) -> Path:
    path = folder / "auth.toml"
    path.write_text(text)
    return path


def new_key(folder: Path, tenant: str = "acme") -> str:
    return KeyStore(folder / "keys.json").create(tenant, [Role.INFER], datetime.now(UTC))[0]


def test_every_file_is_followed(tmp_path: Path) -> None:
    first = new_key(tmp_path)
    (tmp_path / "jwks.json").write_bytes(jwks(jwk_of(rsa_key(), "rsa")))
    path = write(tmp_path, KEYS + jwt_table("jwks.json") + "[tenants.acme]\nweight = 2\n")
    identity = Identity(path)
    assert identity.authenticate(bearer(first), {}).tenant == "acme"
    assert identity.authenticate(bearer(token()), {}).tenant == "acme"
    assert identity.policy.limits_of("acme").weight == 2
    assert not identity.uses_client_certificates

    second = new_key(tmp_path, "beta")
    (tmp_path / "jwks.json").write_bytes(jwks(jwk_of(rsa_key("next"), "next")))
    write(tmp_path, KEYS + jwt_table("jwks.json") + "[tenants.acme]\nweight = 3\n[mtls]\n")
    identity.poll()
    assert identity.authenticate(bearer(second), {}).tenant == "beta"
    assert identity.authenticate(bearer(token(rsa_key("next"), "next")), {}).tenant == "acme"
    assert identity.policy.limits_of("acme").weight == 3
    assert identity.uses_client_certificates
    with pytest.raises(Unauthenticated):
        identity.authenticate(bearer(token()), {})


@pytest.mark.parametrize(
    "broken", ["", "keys = [", KEYS + "[colour]\n", '[keys]\nfile = "absent.json"\n', KEYS + jwt_table("absent.json")]
)
def test_a_broken_auth_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str) -> None:
    text = new_key(tmp_path)
    identity = Identity(write(tmp_path, KEYS + "[default]\nweight = 2\n"))
    write(tmp_path, broken)
    with caplog.at_level(logging.ERROR):
        identity.poll()
        identity.poll()
    assert len(caplog.records) == 1
    assert str(tmp_path) in caplog.text
    assert identity.authenticate(bearer(text), {}).tenant == "acme"
    assert identity.policy.limits_of("acme").weight == 2


STRAY = """
[tenants.acme]
[tenants.acmee]
[tenants.house]
[[share]]
adapter = "house/news"
with = ["acme", "betaa"]
[[share]]
adapter = "hause/news"
with = ["acme"]
[[share]]
adapter = "default/news"
with = ["acme"]
"""


def test_tenants_that_nobody_can_be_are_told_once_per_reading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new_key(tmp_path)
    identity = Identity(write(tmp_path, KEYS + STRAY))
    identity.poll()
    (warning,) = caplog.messages
    assert "[tenants.acmee], share with betaa, share of hause/news;" in warning
    assert "auth.toml" in warning and "keys create" in warning
    write(tmp_path, KEYS + STRAY + "\n")
    identity.poll()
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("more", ["[mtls]\n", jwt_table("jwks.json")])
def test_where_anybody_can_be_a_tenant_none_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: str
) -> None:
    new_key(tmp_path)
    (tmp_path / "jwks.json").write_bytes(jwks(jwk_of(rsa_key(), "rsa")))
    Identity(write(tmp_path, KEYS + more + STRAY))
    assert not caplog.messages


def test_a_broken_keys_file_does_not_stop_the_policy(tmp_path: Path) -> None:
    text = new_key(tmp_path)
    identity = Identity(write(tmp_path, KEYS))
    (tmp_path / "keys.json").write_text("")
    identity.poll()
    assert identity.authenticate(bearer(text), {}).tenant == "acme"


def test_what_is_missing_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(AuthFileError, match=r"auth\.toml"):
        Identity(tmp_path / "auth.toml")
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        Identity(write(tmp_path, KEYS))
    with pytest.raises(JwksError, match=r"jwks\.json"):
        Identity(write(tmp_path, jwt_table("jwks.json")))


async def test_the_first_tokens_wait_for_the_first_fetch(tmp_path: Path, issuer: Issuer) -> None:
    issuer.hold.clear()
    identity = Identity(write(tmp_path, jwt_table(URL)), issuer.fetch)
    calls = [asyncio.create_task(identity.authenticate_patiently(bearer(token(sub=name)), {})) for name in "abc"]
    await asyncio.sleep(0.05)
    calls[0].cancel()  # who goes away does not take the fetch along
    issuer.hold.set()
    assert [(await call).tenant for call in calls[1:]] == ["acme", "acme"]
    assert issuer.num_fetches == 1


async def test_a_rotated_key_is_fetched_once_it_is_used(
    tmp_path: Path, issuer: Issuer, clock: Callable[[float], None]
) -> None:
    identity = Identity(write(tmp_path, jwt_table(URL)), issuer.fetch)
    await identity.authenticate_patiently(bearer(token()), {})
    issuer.document = jwks(jwk_of(rsa_key("next"), "next"))
    rotated = bearer(token(rsa_key("next"), "next"))
    with pytest.raises(Unauthenticated):  # within 10 seconds of the last fetch
        await identity.authenticate_patiently(rotated, {})
    clock(11)
    assert (await identity.authenticate_patiently(rotated, {})).tenant == "acme"
    with pytest.raises(Unauthenticated):
        await identity.authenticate_patiently(bearer(token()), {})


async def test_unknown_kids_cannot_make_us_flood_the_issuer(
    tmp_path: Path, issuer: Issuer, clock: Callable[[float], None]
) -> None:
    identity = Identity(write(tmp_path, jwt_table(URL)), issuer.fetch)
    await identity.authenticate_patiently(bearer(token()), {})
    for period in range(1, 4):
        for number in range(20):
            with pytest.raises(Unauthenticated):
                await identity.authenticate_patiently(bearer(token(rsa_key("thief"), f"kid-{number}")), {})
        assert issuer.num_fetches == period
        clock(11)


async def test_a_token_that_could_never_be_right_makes_us_fetch_nothing(
    tmp_path: Path, issuer: Issuer, clock: Callable[[float], None]
) -> None:
    identity = Identity(write(tmp_path, jwt_table(URL)), issuer.fetch)
    await identity.authenticate_patiently(bearer(token()), {})
    clock(11)
    for text in (token(algorithm="RS512", kid="new"), token(rsa_key("thief")), "a.b.c"):
        with pytest.raises(Unauthenticated):
            await identity.authenticate_patiently(bearer(text), {})
    assert issuer.num_fetches == 1


async def test_an_issuer_that_is_down_takes_no_keys_away(
    tmp_path: Path, issuer: Issuer, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    identity = Identity(write(tmp_path, jwt_table(URL)), issuer.fetch)
    await identity.authenticate_patiently(bearer(token()), {})
    for answer in ("down", "broken"):
        issuer.is_up, issuer.document = answer != "down", b"<html>"
        clock(1000)
        with pytest.raises(Unauthenticated):
            await identity.authenticate_patiently(bearer(token(rsa_key("thief"), "new")), {})
        assert identity.authenticate(bearer(token(sub=answer)), {}).tenant == "acme"
    write(tmp_path, jwt_table(URL) + "[default]\nweight = 2\n")
    identity.poll()
    assert identity.policy.limits_of("acme").weight == 2
    assert identity.authenticate(bearer(token(sub="later")), {}).tenant == "acme"
    assert "cannot be fetched" in caplog.text
    assert "is not JSON" in caplog.text


async def test_an_issuer_that_is_down_is_told_once_and_so_is_its_return(
    tmp_path: Path, issuer: Issuer, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    issuer.is_up = False
    identity = Identity(write(tmp_path, jwt_table(URL)), issuer.fetch)

    async def fetch_again() -> None:
        clock(1000)
        with pytest.raises(Unauthenticated):
            await identity.authenticate_patiently(bearer(token(rsa_key("thief"), "new")), {})

    for is_up in (False, False, True, True, False, False):
        issuer.is_up = is_up
        await fetch_again()
    assert issuer.num_fetches >= 6
    down, back, down_again = caplog.records
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert all(URL in record.getMessage() for record in caplog.records)
    assert "(refused); no keys were fetched yet" in down.getMessage()
    assert "answers again" in back.getMessage()
    assert "keys fetched before (1) are accepted" in down_again.getMessage()


async def test_a_withdrawn_key_is_dropped_without_being_asked_for(
    tmp_path: Path, issuer: Issuer, clock: Callable[[float], None]
) -> None:
    identity = Identity(write(tmp_path, jwt_table(URL)), issuer.fetch)
    await identity.authenticate_patiently(bearer(token()), {})
    issuer.document = jwks(jwk_of(rsa_key("next"), "next"))
    identity.poll()
    assert issuer.num_fetches == 1  # still fresh
    clock(301)
    identity.poll()
    async with asyncio.timeout(10):
        while True:
            try:
                identity.authenticate(bearer(token()), {})
            except Unauthenticated:
                break
            await asyncio.sleep(0.01)
    assert issuer.num_fetches == 2


class Endpoint(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        places = {"/moved": "/jwks", "/http": "http://localhost/jwks", "/file": "file:///etc/hostname"}
        if self.path in places:
            self.send_response(302)
            self.send_header("location", places[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/jwks", "/huge") else 404)
        self.end_headers()
        self.wfile.write(b"x" * (2 << 20) if self.path == "/huge" else jwks(jwk_of(rsa_key(), "rsa")))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def https() -> Iterator[tuple[str, ssl.SSLContext]]:
    ca = trustme.CA()
    server = http.server.ThreadingHTTPServer(("localhost", 0), Endpoint)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("localhost").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    trusting = ssl.create_default_context()
    ca.configure_trust(trusting)
    yield f"https://localhost:{server.server_port}", trusting
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_fetched_over_https(https: tuple[str, ssl.SSLContext]) -> None:
    url, context = https
    for path in ("/jwks", "/moved"):
        assert fetch_jwks(url + path, context) == jwks(jwk_of(rsa_key(), "rsa"))


@pytest.mark.parametrize("path", ["/absent", "/huge", "/http", "/file"])
def test_a_url_that_gives_no_jwks_is_refused(https: tuple[str, ssl.SSLContext], path: str) -> None:
    url, context = https
    with pytest.raises(JwksError, match="localhost"):
        fetch_jwks(url + path, context)


def test_an_endpoint_without_a_trusted_certificate_is_refused(https: tuple[str, ssl.SSLContext]) -> None:
    with pytest.raises(JwksError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch_jwks(https[0] + "/jwks")


def test_an_endpoint_that_is_down_is_told_and_gives_no_keys(caplog: pytest.LogCaptureFixture) -> None:
    source = JwksUrl("https://localhost:9/jwks", ["RS256"], fetch_jwks)
    fetch = source.want_unknown()
    if fetch is not None:
        fetch.result(10)
    assert source.keys == ()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "https://localhost:9/jwks: cannot be fetched" in caplog.text
