"""Public keys of a JWT issuer (RFC 7517), from a file or a URL."""

from __future__ import annotations

import http.client
import json
import logging
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from jwt import PyJWK, PyJWTError

from server.tenancy.auth_file import JwksError
from server.tenancy.reload import OnError, Reloading

_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
# (key type, curve) → what such a key can verify; a secret key (oct) is in no row
_ALGORITHMS: dict[tuple[str, str | None], frozenset[str]] = {
    ("RSA", None): _RSA,
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA"}),
    ("OKP", "Ed448"): frozenset({"EdDSA"}),
}
_MIN_RSA_BITS = 2048
_MAX_JWKS_BYTES = 1 << 20
_MAX_KEYS = 200
_FETCH_TIMEOUT_S = 5.0
MIN_REFRESH_S = 10.0  # between two fetches, however many unknown key ids are sent
MAX_AGE_S = 300.0  # a key that the issuer withdrew is dropped by then

_log = logging.getLogger(__name__)

Fetch: TypeAlias = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key and the algorithms that the config, its type and its own `alg` all allow; never empty."""

    kid: str | None
    algorithms: frozenset[str]
    public: Any  # of cryptography: its classes share no base


class JwksSource(Protocol):
    """Where keys come from. `keys` is the same object until they change."""

    @property
    def keys(self) -> tuple[VerificationKey, ...]: ...

    def want_unknown(self) -> Future[None] | None:
        """A token names a key that is not here. Returns the fetch that may bring it, None if none will soon."""
        ...

    def poll(self) -> object: ...


class JwksFile:
    """Keys of a file, read at once, and again when it changes. Raises JwksError."""

    def __init__(self, path: Path, allowed: Collection[str], on_error: OnError) -> None:
        self._keys = Reloading(path, lambda: parse_jwks(_read(path), str(path), allowed), on_error)

    @property
    def keys(self) -> tuple[VerificationKey, ...]:
        return self._keys.value

    def want_unknown(self) -> Future[None] | None:
        return None  # only a change of the file brings a key

    def poll(self) -> bool:
        return self._keys.poll()


class JwksUrl:
    """Keys of a URL. The first fetch starts at once; while none succeeds the last keys, at first none, are used.

    A fault is logged once, and again when it is another one (out of reach, or no JWKS) or is over.
    """

    def __init__(self, url: str, allowed: Collection[str], fetch: Fetch) -> None:
        self._url = url
        self._allowed = allowed
        self._fetch = fetch
        self._fault = ""  # what the last fetch failed at; empty: it did not
        self._keys: tuple[VerificationKey, ...] = ()
        self._starting = threading.Lock()
        self._fetching: Future[None] | None = None
        self._tried_monotonic = float("-inf")
        self._stale_monotonic = float("-inf")
        self.want_unknown()

    @property
    def keys(self) -> tuple[VerificationKey, ...]:
        return self._keys

    def want_unknown(self) -> Future[None] | None:
        with self._starting:
            now = time.monotonic()
            if self._fetching is not None and not self._fetching.done():
                return self._fetching
            if now - self._tried_monotonic < MIN_REFRESH_S:
                return None
            self._tried_monotonic = now
            self._fetching = fetching = Future[None]()
        threading.Thread(target=self._refresh, args=(fetching,), name="fetch-jwks", daemon=True).start()
        return fetching

    def poll(self) -> None:
        if time.monotonic() >= self._stale_monotonic:
            self.want_unknown()

    def _refresh(self, done: Future[None]) -> None:
        done.set_running_or_notify_cancel()  # who stops waiting must not cancel it for the others
        step = "fetch"
        try:
            data = self._fetch(self._url)
            step = "parse"
            self._keys = parse_jwks(data, self._url, self._allowed)
            self._stale_monotonic = time.monotonic() + MAX_AGE_S
            step = ""
            if self._fault:
                _log.warning("JWT issuer keys: %s answers again, with %d keys", self._url, len(self._keys))
        except Exception as error:  # noqa: BLE001 - whatever the peer did, the keys at hand serve on
            if step != self._fault:
                self._warn(error)
        finally:
            self._fault = step
            done.set_result(None)

    def _warn(self, error: Exception) -> None:
        cause = error if isinstance(error, JwksError) else f"{self._url}: {type(error).__name__}: {error}"
        if self._keys:
            rest = f"tokens of the keys fetched before ({len(self._keys)}) are accepted, those of newer keys refused"
        else:
            rest = "no keys were fetched yet, so every token is refused; API keys and client certificates still work"
        _log.warning("JWT issuer keys: %s; %s; it is tried again every %g s", cause, rest, MIN_REFRESH_S)


def parse_jwks(data: bytes, source: str, allowed: Collection[str]) -> tuple[VerificationKey, ...]:
    """Keys that can verify one of the `allowed` algorithms; others are left out. Raises JwksError."""
    try:
        document: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise JwksError(f"{source}: is not JSON; publish a JWKS (RFC 7517) there") from error
    entries = cast("dict[str, Any]", document).get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise JwksError(f'{source}: has no list "keys"; publish a JWKS (RFC 7517) there')
    entries = cast("list[Any]", entries)
    if len(entries) > _MAX_KEYS:
        raise JwksError(f"{source}: has {len(entries)} keys; {_MAX_KEYS} are the most")
    keys = tuple(key for entry in entries if (key := _parse_key(entry, source, frozenset(allowed))) is not None)
    if not keys:
        raise JwksError(f"{source}: has no key for {', '.join(sorted(allowed))}; correct [jwt] algorithms or jwks")
    return keys


def _parse_key(entry: Any, source: str, allowed: frozenset[str]) -> VerificationKey | None:
    if not isinstance(entry, dict):
        return None
    jwk = cast("dict[str, Any]", entry)
    kid = jwk.get("kid")
    if "d" in jwk:
        raise JwksError(f"{source}: key {kid!r} holds its private part; replace it, and publish the public part only")
    usable = allowed & _algorithms_of(jwk)
    if not usable or not (kid is None or isinstance(kid, str)):
        return None
    try:
        public: Any = PyJWK(jwk, algorithm=min(usable)).key
    except (PyJWTError, ValueError, TypeError) as error:
        _log.warning("%s: key %r is left out: it is malformed (%s)", source, kid, type(error).__name__)
        return None
    if usable <= _RSA and public.key_size < _MIN_RSA_BITS:
        _log.warning("%s: key %r is left out: %d bits are too few", source, kid, public.key_size)
        return None
    return VerificationKey(kid, usable, public)


def _algorithms_of(jwk: dict[str, Any]) -> frozenset[str]:
    """What a key says it may verify, and its type can."""
    kty, curve, own = jwk.get("kty"), jwk.get("crv"), jwk.get("alg")
    operations = jwk.get("key_ops", ["verify"])
    verifies = isinstance(operations, list) and "verify" in operations and jwk.get("use", "sig") == "sig"
    if not isinstance(kty, str) or not verifies:
        return frozenset()
    of_type = _ALGORITHMS.get((kty, curve if kty != "RSA" and isinstance(curve, str) else None), frozenset[str]())
    return of_type if own is None else of_type & {str(own)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JwksError(f"{path}: cannot be read ({error.strerror}); correct [jwt] jwks") from error


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://"):
            raise JwksError(f"{req.full_url}: redirects away from https; correct [jwt] jwks")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_jwks(url: str, context: ssl.SSLContext | None = None) -> bytes:
    """The document at an https:// URL. Raises JwksError."""
    context = context or ssl.create_default_context()
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _HttpsOnly)
    deadline_monotonic = time.monotonic() + 2 * _FETCH_TIMEOUT_S
    data = b""
    try:
        with opener.open(url, timeout=_FETCH_TIMEOUT_S) as response:
            while piece := response.read1(1 << 16):
                data += piece
                if len(data) > _MAX_JWKS_BYTES or time.monotonic() > deadline_monotonic:
                    raise JwksError(f"{url}: is too large or too slow for a JWKS")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise JwksError(f"{url}: cannot be fetched ({error})") from error
    return data
