"""The auth file: what it gives, and that each fault names file, key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.tenancy.auth_file import AuthFileError, load_auth_file
from server.tenancy.model import Limits, Principal, Role

FULL = """
[keys]
file = "secrets/keys.json"

[jwt]
jwks = "jwks.json"
issuer = "https://login.example"
audience = "multilora"
algorithms = ["RS256", "EdDSA"]
tenant_claim = "org"
leeway = 5

[mtls]
roles = ["infer", "adapters"]
tenant_from = "spiffe"
trust_domain = "example.org"

[default]
requests_per_second = 50
max_concurrent_requests = 8

[tenants.acme]
weight = 4.0
requests_per_second = 500
max_resident_mib = 256

[tenants.beta]
requests_per_second = "unlimited"

[[share]]
adapter = "acme/news"
with = ["beta", "gamma"]

[[share]]
adapter = "acme/news"
with = ["delta"]
"""
KEYS = '[keys]\nfile = "keys.json"\n'
JWT = '[jwt]\njwks = "jwks.json"\nissuer = "i"\naudience = "a"\nalgorithms = ["RS256"]\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "auth.toml"
    path.write_text(text)
    return path


def test_a_full_file(tmp_path: Path) -> None:
    config = load_auth_file(write(tmp_path, FULL))
    assert config.keys_file == tmp_path / "secrets" / "keys.json"
    assert config.jwt is not None
    assert config.jwt.jwks == str(tmp_path / "jwks.json")
    assert (config.jwt.tenant_claim, config.jwt.roles_claim, config.jwt.leeway) == ("org", "roles", 5)
    assert config.mtls is not None
    assert config.mtls.roles == {Role.INFER, Role.ADAPTERS}
    assert config.mtls.trust_domain == "example.org"


def test_tenants_inherit_the_default_limits(tmp_path: Path) -> None:
    policy = load_auth_file(write(tmp_path, FULL)).policy
    assert policy.limits_of("stranger") == Limits(requests_per_second=50, max_concurrent_requests=8)
    assert policy.limits_of("acme") == Limits(
        weight=4.0, requests_per_second=500, max_concurrent_requests=8, max_resident_bytes=256 << 20
    )
    assert policy.limits_of("beta") == Limits(requests_per_second=None, max_concurrent_requests=8)


def test_shares_of_one_adapter_add_up(tmp_path: Path) -> None:
    policy = load_auth_file(write(tmp_path, FULL)).policy
    for tenant, may in (("acme", True), ("beta", True), ("gamma", True), ("delta", True), ("omega", False)):
        assert policy.may_ask(Principal(tenant, frozenset({Role.INFER}), "x"), "acme", "news") is may
    assert not policy.may_ask(Principal("beta", frozenset({Role.INFER}), "x"), "acme", "sport")


def test_a_url_stays_a_url(tmp_path: Path) -> None:
    text = JWT.replace("jwks.json", "https://login.example/jwks")
    config = load_auth_file(write(tmp_path, text)).jwt
    assert config is not None
    assert config.is_url
    assert config.jwks == "https://login.example/jwks"


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512", "hs256", "none", "None", "RS1", "ES256K", ""])
def test_only_asymmetric_algorithms_are_accepted(tmp_path: Path, algorithm: str) -> None:
    with pytest.raises(AuthFileError, match=rf"auth\.toml: jwt\.algorithms\.0 = '{algorithm}': .*RS256"):
        load_auth_file(write(tmp_path, JWT.replace("RS256", algorithm)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (KEYS + "colour = 1\n", "keys.colour is not a key of an auth file; correct or remove it"),
        (KEYS + "[limits]\n", "limits is not a key of an auth file"),
        (KEYS + "[tenants.acme]\nrps = 1\n", "tenants.acme.rps is not a key"),
        ("[keys]\n", "keys.file is required"),
        (JWT.replace('issuer = "i"\n', ""), "jwt.issuer is required"),
        (JWT.replace('["RS256"]', "[]"), "jwt.algorithms = []"),
        (JWT.replace('["RS256"]', '"RS256"'), "jwt.algorithms = 'RS256'"),
        (JWT.replace('audience = "a"', 'audience = ""'), "jwt.audience = ''"),
        (JWT.replace("jwks.json", "http://login.example/jwks"), "https://"),
        (JWT.replace("jwks.json", "file:///jwks.json"), "https://"),
        (JWT + "leeway = -1\n", "jwt.leeway = -1"),
        (JWT + "leeway = 3600\n", "jwt.leeway = 3600"),
        ("[mtls]\nroles = []\n", "mtls.roles = []"),
        ('[mtls]\nroles = ["root"]\n', "mtls.roles.0 = 'root'"),
        ('[mtls]\ntenant_from = "email"\n', "mtls.tenant_from = 'email'"),
        (KEYS + "[default]\nrequests_per_second = 0\n", "default.requests_per_second = 0"),
        (KEYS + "[default]\nrequests_per_second = nan\n", "default.requests_per_second = nan"),
        (KEYS + "[default]\nrequests_per_second = inf\n", "default.requests_per_second = inf"),
        (KEYS + '[default]\nrequests_per_second = "9"\n', "default.requests_per_second = '9'"),
        (KEYS + "[default]\nmax_concurrent_requests = 1.5\n", "default.max_concurrent_requests = 1.5"),
        (KEYS + "[default]\nmax_concurrent_requests = true\n", "default.max_concurrent_requests = True"),
        (KEYS + "[tenants.acme]\nweight = -1\n", "tenants.acme.weight = -1"),
        (KEYS + '[tenants."../acme"]\n', "'../acme' is not a name"),
        (KEYS + '[[share]]\nadapter = "news"\nwith = ["beta"]\n', "share.0.adapter = 'news': is not TENANT/ADAPTER"),
        (KEYS + '[[share]]\nadapter = "acme/news@1"\nwith = ["beta"]\n', "all versions"),
        (KEYS + '[[share]]\nadapter = "acme/news"\nwith = ["*"]\n', "share.0.with.0 = '*'"),
        (KEYS + '[[share]]\nadapter = "acme/news"\nwith = []\n', "share.0.with = []"),
        (KEYS + '[[share]]\nadapter = "acme/news"\n', "share.0.with is required"),
        ("", "nobody could call; add [keys], [jwt] or [mtls]"),
        ("[default]\nweight = 1\n", "nobody could call"),
        ("keys = [", "is not TOML"),
    ],
)
def test_a_fault_names_file_key_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(AuthFileError) as caught:
        load_auth_file(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert message in str(caught.value)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(AuthFileError) as caught:
        load_auth_file(write(tmp_path, KEYS + "[default]\nweight = 0\nmax_queued_sequences = 0\n"))
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(AuthFileError, match=r"absent\.toml: cannot be read"):
        load_auth_file(tmp_path / "absent.toml")
    (tmp_path / "auth.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(AuthFileError, match="is not TOML"):
        load_auth_file(tmp_path / "auth.toml")
