"""JWTs: what one must prove, and every trick that must not pass."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.tenancy import jwt as jwt_module
from server.tenancy.auth_file import JwksError, JwtConfig
from server.tenancy.jwks import parse_jwks
from server.tenancy.jwt import JwtVerifier
from server.tenancy.model import Principal, Role
from tests.unit.tenancy_tokens import (
    AUDIENCE,
    ISSUER,
    claims,
    ec_key,
    ed_key,
    encoded,
    hand_made,
    jwk_of,
    jwks,
    rsa_key,
    token,
)

KEYS = (("rsa", rsa_key), ("ec", ec_key), ("ed", ed_key))


def fail(error: Exception) -> None:
    raise AssertionError("nothing should go wrong") from error


def config(path: Path, **changes: Any) -> JwtConfig:
    values: dict[str, Any] = {
        "jwks": str(path),
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "algorithms": ("RS256", "ES256", "EdDSA"),
        **changes,
    }
    return JwtConfig.model_validate(values)


@pytest.fixture
def jwks_file(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(*(jwk_of(key(), kid) for kid, key in KEYS)))
    return path


@pytest.fixture
def verifier(jwks_file: Path) -> JwtVerifier:
    return JwtVerifier.open(config(jwks_file), fail)


def verified(verifier: JwtVerifier, text: str) -> Any:
    return verifier.verify(text, time.time())


@pytest.mark.parametrize(
    ("kid", "key", "algorithm"), [("rsa", rsa_key, "RS256"), ("ec", ec_key, "ES256"), ("ed", ed_key, "EdDSA")]
)
def test_a_right_token_is_a_principal(verifier: JwtVerifier, kid: str, key: Any, algorithm: str) -> None:
    principal = verified(verifier, token(key(), kid, algorithm))
    assert principal == Principal("acme", frozenset({Role.ADAPTERS}), "ci")


def rsa_pem() -> bytes:
    return rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def rsa_der() -> bytes:
    return rsa_key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


FORGED = {
    "alg none": lambda: hand_made({"alg": "none", "kid": "rsa"}, claims(), None),
    "alg NONE": lambda: hand_made({"alg": "NONE", "kid": "rsa"}, claims(), None),
    "alg missing": lambda: hand_made({"kid": "rsa"}, claims(), None),
    "alg a list": lambda: hand_made({"alg": ["RS256"], "kid": "rsa"}, claims(), None),
    "HS256 under the public key as PEM": lambda: hand_made({"alg": "HS256", "kid": "rsa"}, claims(), rsa_pem()),
    "HS256 under the public key as DER": lambda: hand_made({"alg": "HS256", "kid": "rsa"}, claims(), rsa_der()),
    "HS256 under the public key as JWK": lambda: hand_made(
        {"alg": "HS256", "kid": "rsa"}, claims(), json.dumps(jwk_of(rsa_key(), "rsa")).encode()
    ),
    "RS256 with an HMAC": lambda: hand_made({"alg": "RS256", "kid": "rsa"}, claims(), rsa_pem()),
    "no signature": lambda: token().rsplit(".", 1)[0] + ".",
    "another key": lambda: token(rsa_key("thief")),
    "the algorithm of another key": lambda: token(ec_key(), "rsa", "ES256"),
    "a kid of another type": lambda: token(kid="ec"),
    "an algorithm that is not listed": lambda: token(algorithm="RS512"),
    "PS256 with an RS256 key, not listed": lambda: token(algorithm="PS256"),
    "an unknown kid": lambda: token(rsa_key("thief"), "new"),
    "no kid, many keys of one type or none": lambda: token(rsa_key("thief"), None),
    "a kid that is a path": lambda: token(rsa_key("thief"), "../../../../dev/null"),
    "a kid that is a URL": lambda: token(rsa_key("thief"), "https://thief.example/jwks.json"),
    "a kid that is SQL": lambda: token(rsa_key("thief"), "x' UNION SELECT 'AA"),
    "an empty kid": lambda: token(rsa_key("thief"), ""),
    "a kid that is a number": lambda: hand_made({"alg": "RS256", "kid": 1}, claims(), b"x"),
    "its own jwk": lambda: token(rsa_key("thief"), headers={"jwk": jwk_of(rsa_key("thief"), "rsa")}),
    "its own jku": lambda: token(rsa_key("thief"), headers={"jku": "https://thief.example/jwks.json"}),
    "its own x5u": lambda: token(rsa_key("thief"), headers={"x5u": "https://thief.example/cert.pem"}),
    "its own x5c": lambda: token(rsa_key("thief"), headers={"x5c": ["MIIB"]}),
    "a demand that is not met": lambda: token(headers={"crit": ["exp"], "exp": 1}),
    "an unencoded payload": lambda: token(headers={"crit": ["b64"], "b64": False}),
    "b64": lambda: token(headers={"crit": ["b64"], "b64": True}),
}  # fmt: skip


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_a_forged_token_proves_nothing(verifier: JwtVerifier, forge: Any) -> None:
    assert verified(verifier, forge()) is None


WRONG_CLAIMS: dict[str, dict[str, Any]] = {
    "expired": {"exp": int(time.time()) - 100},
    "no exp": {"exp": None},
    "exp is a word": {"exp": "soon"},
    "exp is infinite": {"exp": float("inf")},
    "exp is not a number": {"exp": float("nan")},
    "not yet": {"nbf": int(time.time()) + 1000},
    "another issuer": {"iss": "https://login.example.thief"},
    "issuer in a list": {"iss": [ISSUER]},
    "no issuer": {"iss": None},
    "another audience": {"aud": "multilora2"},
    "audience by prefix": {"aud": "multi"},
    "no audience": {"aud": None},
    "empty audiences": {"aud": []},
    "no tenant": {"tenant": None},
    "tenant is a path": {"tenant": "../acme"},
    "tenant is empty": {"tenant": ""},
    "tenant with a newline": {"tenant": "acme\n"},
    "tenant is a list": {"tenant": ["acme"]},
    "tenant too long": {"tenant": "a" * 129},
    "subject is a number": {"sub": 3},
}


@pytest.mark.parametrize("changes", WRONG_CLAIMS.values(), ids=WRONG_CLAIMS.keys())
def test_a_signed_token_with_wrong_claims_proves_nothing(verifier: JwtVerifier, changes: dict[str, Any]) -> None:
    try:
        text = token(**changes)
    except TypeError:  # PyJWT itself would not make it
        text = signed_by_hand(claims(**changes))
    assert verified(verifier, text) is None


def signed_by_hand(payload: dict[str, Any]) -> str:
    from jwt.api_jws import encode

    return encode(json.dumps(payload).encode(), rsa_key(), "RS256", {"kid": "rsa"})


@pytest.mark.parametrize("payload", [b"[]", b"null", b"\xff", b"[" * 3000, b"{"])
def test_a_signed_payload_that_is_no_object_proves_nothing(verifier: JwtVerifier, payload: bytes) -> None:
    from jwt.api_jws import encode

    assert verified(verifier, encode(payload, rsa_key(), "RS256", {"kid": "rsa"})) is None


@pytest.mark.parametrize(
    "text",
    ["..", "a.b.c", "é.é.é", f"{encoded(b'[' * 5000)}.e30.e30", f"{encoded(b'null')}.e30.e30", "====.====.===="],
)
def test_a_malformed_token_proves_nothing(verifier: JwtVerifier, text: str) -> None:
    assert verified(verifier, text) is None


def test_the_clocks_may_differ_by_the_leeway(jwks_file: Path) -> None:
    patient = JwtVerifier.open(config(jwks_file, leeway=60.0), fail)
    strict = JwtVerifier.open(config(jwks_file, leeway=0.0), fail)
    late = token(exp=int(time.time()) - 20)
    early = token(nbf=int(time.time()) + 20)
    assert isinstance(verified(patient, late), Principal)
    assert isinstance(verified(patient, early), Principal)
    assert verified(strict, late) is None
    assert verified(strict, early) is None
    assert verified(patient, token(exp=int(time.time()) - 61)) is None


@pytest.mark.parametrize(
    ("claim", "roles"),
    [
        (None, {Role.INFER}),
        ([], {Role.INFER}),
        (["admin"], {Role.INFER}),
        (["admin", "adapters", 3, None], {Role.ADAPTERS}),
        ("openid infer operator", {Role.INFER, Role.OPERATOR}),
        ({"operator": True}, {Role.INFER}),
        ("OPERATOR", {Role.INFER}),
    ],
)
def test_unknown_roles_are_ignored(verifier: JwtVerifier, claim: Any, roles: set[Role]) -> None:
    assert verified(verifier, token(roles=claim)).roles == roles


def test_claims_can_have_other_names(jwks_file: Path) -> None:
    verifier = JwtVerifier.open(config(jwks_file, tenant_claim="org", roles_claim="scope"), fail)
    principal = verified(verifier, token(org="beta", scope="infer", tenant="acme", roles=["operator"]))
    assert principal == Principal("beta", frozenset({Role.INFER}), "ci")


def test_a_token_without_kid_is_checked_against_an_issuers_only_key(verifier: JwtVerifier) -> None:
    assert isinstance(verified(verifier, token(kid=None)), Principal)


def test_a_subject_cannot_forge_log_lines(verifier: JwtVerifier) -> None:
    assert "\n" not in verified(verifier, token(sub="x\n2026 ERROR")).name


def test_a_verified_token_is_remembered_until_it_expires(
    verifier: JwtVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    text = token(exp=int(now) + 100)
    assert isinstance(verifier.verify(text, now), Principal)
    monkeypatch.setattr(jwt_module.jwt, "decode", lambda *_, **__: pytest.fail("the token was verified again"))
    assert isinstance(verifier.verify(text, now + 99), Principal)
    monkeypatch.undo()
    monkeypatch.setattr(jwt_module.jwt, "decode", lambda *_, **__: (_ for _ in ()).throw(jwt_module.PyJWTError))
    assert verifier.verify(text, now + 131) is None  # 30 seconds of leeway


def test_a_remembered_token_vouches_for_no_other(verifier: JwtVerifier) -> None:
    good = token()
    assert isinstance(verified(verifier, good), Principal)
    head, payload, signature = good.split(".")
    other = encoded(json.dumps(claims(tenant="beta")).encode())
    assert verified(verifier, f"{head}.{other}.{signature}") is None
    assert verified(verifier, f"{head}.{payload}.{signature[:-8]}AAAAAAAA") is None


def test_remembered_tokens_are_bounded(verifier: JwtVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwt_module, "MAX_CACHED", 3)
    for number in range(8):
        verified(verifier, token(ed_key(), "ed", "EdDSA", sub=str(number)))
    assert len(verifier._cache) == 3


def test_a_rotated_file_brings_new_keys_and_drops_old_tokens(jwks_file: Path, verifier: JwtVerifier) -> None:
    old, new = token(), token(rsa_key("next"), "next")
    assert isinstance(verified(verifier, old), Principal)
    assert verified(verifier, new) is None
    jwks_file.write_bytes(jwks(jwk_of(rsa_key("next"), "next")))
    verifier.poll()
    assert isinstance(verified(verifier, new), Principal)
    assert verified(verifier, old) is None  # remembered, but its key was withdrawn


def test_a_broken_file_keeps_the_keys(jwks_file: Path) -> None:
    errors: list[Exception] = []
    verifier = JwtVerifier.open(config(jwks_file), errors.append)
    jwks_file.write_bytes(b'{"keys": [')
    verifier.poll()
    verifier.poll()
    assert isinstance(verified(verifier, token()), Principal)
    assert [type(error) for error in errors] == [JwksError]
    assert str(jwks_file) in str(errors[0])


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(JwksError, match=r"absent\.json: cannot be read"):
        JwtVerifier.open(config(tmp_path / "absent.json"), fail)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": []}',
        b"[" * 3000,
        jwks({"kty": "oct", "k": "AAAA", "kid": "rsa", "alg": "HS256"}),
        jwks({"kty": "oct", "k": "AAAA", "kid": "rsa", "alg": "RS256"}),
        jwks(jwk_of(rsa_key(), "rsa", use="enc")),
        jwks(jwk_of(rsa_key(), "rsa", key_ops=["encrypt"])),
        jwks(jwk_of(rsa_key(), "rsa", key_ops=7)),
        jwks(jwk_of(rsa_key(), "rsa", alg="RS512")),
        jwks({**jwk_of(rsa_key(), "rsa"), "n": "!"}),
        jwks(*[jwk_of(rsa_key(), str(number)) for number in range(201)]),
    ],
)
def test_a_set_without_a_usable_key_is_refused(data: bytes) -> None:
    with pytest.raises(JwksError):
        parse_jwks(data, "jwks.json", ["RS256"])


def test_a_set_with_a_private_key_is_refused() -> None:
    with pytest.raises(JwksError, match="private part"):
        parse_jwks(jwks(jwk_of(rsa_key(), "rsa", d="AQAB")), "jwks.json", ["RS256"])


def test_a_short_rsa_key_is_left_out() -> None:
    short = jwk_of(rsa.generate_private_key(65537, 1024), "short")
    keys = parse_jwks(jwks(short, jwk_of(rsa_key(), "rsa")), "jwks.json", ["RS256"])
    assert [key.kid for key in keys] == ["rsa"]
