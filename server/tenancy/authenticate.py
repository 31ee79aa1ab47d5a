"""From what a call brings (metadata, a client certificate) to a principal, or one refusal for every cause."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeAlias

from lora_runtime.errors import MultiloraError
from server.tenancy.auth_file import MtlsConfig
from server.tenancy.jwt import JwtVerifier
from server.tenancy.keys import KEY_PREFIX
from server.tenancy.model import ANYBODY, Principal
from server.tenancy.mtls import principal_of_certificate

AUTHORIZATION = "authorization"
MAX_HEADER_CHARS = 8192
_BEARER = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]+)")  # RFC 6750, in ASCII alone

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
AuthContext: TypeAlias = Mapping[str, Iterable[bytes]]


class Unauthenticated(MultiloraError):
    """Who calls is not known. Why is not said: it would help to guess."""

    reason = "UNAUTHENTICATED"

    def __init__(self, fetch: Future[None] | None = None, key_id: str = "") -> None:
        super().__init__("missing or wrong credentials; send authorization: Bearer …")
        self.fetch = fetch  # of issuer keys, under way: after it, the same credentials may be right
        self.key_id = key_id  # of a key that is revoked or expired, for the audit log alone


class Authenticator(Protocol):
    def authenticate(self, metadata: Metadata, auth_context: AuthContext) -> Principal:
        """Who calls. Raises Unauthenticated."""
        ...


class KeyVerifier(Protocol):
    def verify(self, token: str, now_unix_s: float) -> Principal | None: ...

    def id_of(self, token: str) -> str: ...


class NoAuthentication:
    """Everybody may do everything: for one team behind its own walls."""

    def authenticate(self, metadata: Metadata, auth_context: AuthContext) -> Principal:  # noqa: ARG002
        return ANYBODY


class AuthChain:
    """API keys, JWTs and client certificates, whichever are configured.

    A bearer token decides alone: a certificate does not rescue a wrong one, since a caller that sends a token means to
    be who the token says.
    """

    def __init__(
        self,
        keys: KeyVerifier | None = None,
        jwt: JwtVerifier | None = None,
        mtls: MtlsConfig | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._jwt = jwt
        self._mtls = mtls
        self._clock = clock

    def authenticate(self, metadata: Metadata, auth_context: AuthContext) -> Principal:
        """Who calls. Raises Unauthenticated."""
        headers = [value for key, value in metadata if key == AUTHORIZATION]
        principal = self._by_token(headers) if headers else self._by_certificate(auth_context)
        if not isinstance(principal, Principal):
            raise Unauthenticated(principal, self._key_id(headers))
        return principal

    def _by_token(self, headers: Sequence[str | bytes]) -> Principal | Future[None] | None:
        token = _bearer(headers)
        if token is None:
            return None
        if token.startswith(KEY_PREFIX):
            return None if self._keys is None else self._keys.verify(token, self._clock())
        if self._jwt is not None and token.count(".") == 2:
            return self._jwt.verify(token, self._clock())
        return None

    def _key_id(self, headers: Sequence[str | bytes]) -> str:
        token = _bearer(headers)
        return "" if token is None or self._keys is None else self._keys.id_of(token)

    def _by_certificate(self, auth_context: AuthContext) -> Principal | None:
        return None if self._mtls is None else principal_of_certificate(auth_context, self._mtls)


def _bearer(headers: Sequence[str | bytes]) -> str | None:
    """The token of the one header; two of them could mean one thing to a proxy and another to us."""
    if len(headers) != 1 or isinstance(header := headers[0], bytes) or len(header) > MAX_HEADER_CHARS:
        return None
    match = _BEARER.fullmatch(header)
    return None if match is None else match[1]
