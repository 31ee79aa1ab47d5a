"""JSON Web Tokens (RFC 7519) of one issuer, as principals."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import jwt
from jwt import PyJWTError

from lora_runtime.errors import InvalidRequest, shown
from lora_runtime.types import check_name
from server.tenancy.auth_file import JwtConfig
from server.tenancy.jwks import Fetch, JwksFile, JwksSource, JwksUrl, VerificationKey, fetch_jwks
from server.tenancy.model import Principal, Role
from server.tenancy.reload import OnError

MAX_CACHED = 10_000
_MAX_CACHED_S = 3600.0
_MAX_SUBJECT_CHARS = 200
_ROLES = {role.value: role for role in Role}


class JwtVerifier:
    """Checks tokens against the keys of the issuer. Belongs to one thread, but for `poll`.

    The key decides the algorithm, the token only names both: a key is asked for the algorithms that its own type allows
    and the config lists. Headers that bring keys (`jwk`, `jku`, `x5c`, `x5u`) are not looked at.
    """

    def __init__(self, config: JwtConfig, source: JwksSource) -> None:
        self._config = config
        self._source = source
        self._keys = source.keys
        self._cache: dict[bytes, tuple[Principal, float]] = {}  # SHA-256 of a token → until when (unix) it is good

    @classmethod
    def open(cls, config: JwtConfig, on_error: OnError, fetch: Fetch = fetch_jwks) -> JwtVerifier:
        """With the JWKS that the config names. Raises JwksError when a file cannot be used; a URL may come up later."""
        if config.is_url:
            return cls(config, JwksUrl(config.jwks, config.algorithms, fetch))
        return cls(config, JwksFile(Path(config.jwks), config.algorithms, on_error))

    def verify(self, token: str, now_unix_s: float) -> Principal | Future[None] | None:
        """Whose token it is; None if it proves nothing; a fetch after which its key may be known."""
        keys = self._source.keys
        if keys is not self._keys:  # what a withdrawn key proved is forgotten with it
            self._keys, self._cache = keys, {}
        digest = hashlib.sha256(token.encode()).digest()
        if (cached := self._cache.get(digest)) is not None:
            principal, ends_unix_s = cached
            if now_unix_s < ends_unix_s:
                return principal
            del self._cache[digest]
        claims = self._claims(token, keys)
        if not isinstance(claims, dict):
            return claims
        principal = _principal(claims, self._config)
        if principal is None:
            return None
        if len(self._cache) >= MAX_CACHED:
            del self._cache[next(iter(self._cache))]
        # an absurd exp must not keep an entry, nor overflow a float
        self._cache[digest] = principal, min(int(claims["exp"]) + self._config.leeway, now_unix_s + _MAX_CACHED_S)
        return principal

    def poll(self) -> None:
        self._source.poll()

    def _claims(self, token: str, keys: tuple[VerificationKey, ...]) -> dict[str, Any] | Future[None] | None:
        header = _header(token)
        if header is None or header.get("alg") not in self._config.algorithms:
            return None
        kid = header.get("kid")
        candidates = [key for key in keys if header["alg"] in key.algorithms and (kid is None or kid == key.kid)]
        if not candidates:
            return self._source.want_unknown()
        if len(candidates) != 1:  # without a kid, only an issuer with a single key is clear
            return None
        key = candidates[0]
        try:
            return jwt.decode(
                token,
                key.public,
                algorithms=sorted(key.algorithms),
                issuer=self._config.issuer,
                audience=self._config.audience,
                leeway=self._config.leeway,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            return None


def _header(token: str) -> dict[str, Any] | None:
    """The header, which nothing vouches for yet; None if it is malformed or demands what is not implemented."""
    try:
        header: dict[str, Any] = jwt.get_unverified_header(token)
    except (PyJWTError, ValueError, TypeError, RecursionError):
        return None
    return header if isinstance(header.get("alg"), str) else None


def _principal(claims: dict[str, Any], config: JwtConfig) -> Principal | None:
    tenant = claims.get(config.tenant_claim)
    if not isinstance(tenant, str):
        return None
    try:
        check_name(config.tenant_claim, tenant)
    except InvalidRequest:
        return None
    subject = claims.get("sub")
    name = shown(subject[:_MAX_SUBJECT_CHARS]) if isinstance(subject, str) and subject else "no subject"
    return Principal(tenant, _roles(claims.get(config.roles_claim)), name)


def _roles(claim: object) -> frozenset[Role]:
    """Of a list, or of words in a string as OAuth's `scope` has them. Roles of other services are common: ignored."""
    words: Sequence[object] = ()
    if isinstance(claim, str):
        words = claim.split()
    elif isinstance(claim, list):
        words = cast("list[object]", claim)
    return frozenset(_ROLES[word] for word in words if isinstance(word, str) and word in _ROLES) or frozenset(
        {Role.INFER}
    )
