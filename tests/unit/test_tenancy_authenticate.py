"""Which credential decides, and that every refusal looks the same."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from server.tenancy.auth_file import JwtConfig, MtlsConfig
from server.tenancy.authenticate import AuthChain, NoAuthentication, Unauthenticated
from server.tenancy.jwt import JwtVerifier
from server.tenancy.keys import KeyRing, KeyStore
from server.tenancy.model import ANYBODY, Role
from tests.unit.tenancy_tokens import AUDIENCE, ISSUER, jwk_of, jwks, rsa_key, token

CERTIFICATE = {"transport_security_type": [b"ssl"], "x509_common_name": [b"cert-tenant"]}


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.json")


@pytest.fixture
def key(store: KeyStore) -> str:
    return store.create("key-tenant", [Role.INFER], datetime.now(UTC))[0]


@pytest.fixture
def chain(store: KeyStore, key: str, tmp_path: Path) -> AuthChain:
    assert key
    return AuthChain(KeyRing(store.list()), jwt_verifier(tmp_path), MtlsConfig())


def jwt_verifier(folder: Path) -> JwtVerifier:
    (folder / "jwks.json").write_bytes(jwks(jwk_of(rsa_key(), "rsa")))
    config = JwtConfig(jwks=str(folder / "jwks.json"), issuer=ISSUER, audience=AUDIENCE, algorithms=("RS256",))
    return JwtVerifier.open(config, lambda error: pytest.fail(str(error)))


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    return (("user-agent", "x"), ("authorization", f"Bearer {text}"))


def test_each_credential_names_its_tenant(chain: AuthChain, key: str) -> None:
    assert chain.authenticate(bearer(key), {}).tenant == "key-tenant"
    assert chain.authenticate(bearer(token()), {}).tenant == "acme"
    assert chain.authenticate((), CERTIFICATE).tenant == "cert-tenant"


def test_a_token_decides_before_a_certificate(chain: AuthChain, key: str) -> None:
    assert chain.authenticate(bearer(key), CERTIFICATE).tenant == "key-tenant"


def test_the_scheme_is_read_without_case(chain: AuthChain, key: str) -> None:
    assert chain.authenticate((("authorization", f"bEARER  {key}"),), {}).tenant == "key-tenant"


WRONG: dict[str, Any] = {
    "nothing": lambda _: (),
    "an empty header": lambda _: (("authorization", ""),),
    "the scheme alone": lambda _: (("authorization", "Bearer "),),
    "no scheme": lambda key: (("authorization", key),),
    "another scheme": lambda key: (("authorization", f"Basic {key}"),),
    "bytes": lambda key: (("authorization", f"Bearer {key}".encode()),),
    "a binary header": lambda key: (("authorization-bin", f"Bearer {key}".encode()),),
    "another header": lambda key: (("x-api-key", key),),
    "the same header twice": lambda key: bearer(key) + bearer(key),
    "a second, empty header": lambda key: (*bearer(key), ("authorization", "")),
    "two tokens in one header": lambda key: bearer(f"{key}, Bearer {key}"),
    "a trailing space": lambda key: bearer(key + " "),
    "a trailing newline": lambda key: bearer(key + "\n"),
    "a tab": lambda key: (("authorization", f"Bearer\t{key}"),),
    "a NUL": lambda key: bearer(key + "\0"),
    "not ASCII": lambda key: bearer(key[:-1] + "é"),
    "digits that are not ASCII": lambda key: bearer(key[:-1] + "٣"),
    "too long": lambda key: (("authorization", "Bearer " + " " * 8192 + key),),
    "a wrong key": lambda key: bearer(key[:-1] + ("A" if key[-1] != "A" else "B")),
    "a key that is neither": lambda _: bearer("opaque"),
    "a wrong JWT": lambda _: bearer(token(rsa_key("thief"))),
    "a JWT of five parts": lambda _: bearer("a.b.c.d.e"),
    "a key with two dots": lambda key: bearer(key + ".a.b"),
}


@pytest.mark.parametrize("metadata", WRONG.values(), ids=WRONG.keys())
def test_every_refusal_looks_the_same(chain: AuthChain, key: str, metadata: Any) -> None:
    with pytest.raises(Unauthenticated) as caught:
        chain.authenticate(metadata(key), {})
    assert caught.value.message == "missing or wrong credentials; send authorization: Bearer …"
    assert caught.value.metadata == {}
    assert caught.value.reason == "UNAUTHENTICATED"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "name", [name for name in WRONG if name not in ("nothing", "a binary header", "another header")]
)
def test_a_certificate_rescues_no_wrong_header(chain: AuthChain, key: str, name: str) -> None:
    with pytest.raises(Unauthenticated):
        chain.authenticate(WRONG[name](key), CERTIFICATE)


def test_what_is_not_configured_is_refused(key: str, tmp_path: Path) -> None:
    nothing = AuthChain()
    for metadata in (bearer(key), bearer(token()), ()):
        with pytest.raises(Unauthenticated):
            nothing.authenticate(metadata, CERTIFICATE)
    with pytest.raises(Unauthenticated):
        AuthChain(jwt=jwt_verifier(tmp_path)).authenticate(bearer(key), CERTIFICATE)
    with pytest.raises(Unauthenticated):
        AuthChain(mtls=MtlsConfig()).authenticate(bearer(key), CERTIFICATE)


def test_keys_expire_by_the_clock(store: KeyStore) -> None:
    now = datetime.now(UTC)
    text, _ = store.create("acme", [Role.INFER], now, now + timedelta(hours=1))
    chain = AuthChain(KeyRing(store.list()), clock=lambda: now.timestamp() + 3601)
    with pytest.raises(Unauthenticated):
        chain.authenticate(bearer(text), {})


def test_without_authentication_everybody_is_anybody() -> None:
    assert NoAuthentication().authenticate(bearer("x"), {}) is ANYBODY


def test_it_is_quick(chain: AuthChain, key: str) -> None:
    """50 µs is what a request may pay; a busy machine gets ten times that."""
    for metadata in (bearer(key), bearer(token())):
        chain.authenticate(metadata, {})
        best_s = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(100):
                chain.authenticate(metadata, {})
            best_s = min(best_s, (time.perf_counter() - started) / 100)
        assert best_s < 500e-6
