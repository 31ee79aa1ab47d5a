"""The auth file at work: who calls, and the policy, following every file they come from."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.types import DEFAULT_TENANT
from server.tenancy.auth_file import AuthConfig, JwtConfig, load_auth_file
from server.tenancy.authenticate import AuthChain, AuthContext, Metadata, Unauthenticated
from server.tenancy.jwks import Fetch, fetch_jwks
from server.tenancy.jwt import JwtVerifier
from server.tenancy.keys import WatchedKeys
from server.tenancy.model import Policy, Principal
from server.tenancy.reload import Reloading, poll_every

_MAX_FETCH_WAIT_S = 5.0
_MAX_NAMED = 20  # in one line of the log

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _State:
    """Everything that one reading of the auth file gives; replaced as a whole."""

    config: AuthConfig
    keys: WatchedKeys | None
    jwt: JwtVerifier | None
    chain: AuthChain


class Identity:
    """An Authenticator and a Policy made from an auth file. Raises AuthFileError, at the start only.

    Later, a file that is broken keeps what was read before and is logged.
    """

    def __init__(self, auth_file: Path, fetch: Fetch = fetch_jwks) -> None:
        self._fetch = fetch
        self._last_jwt: tuple[JwtConfig, JwtVerifier] | None = None
        self._state = Reloading(auth_file, lambda: self._load(auth_file), _keep)

    @property
    def policy(self) -> Policy:
        return self._state.value.config.policy

    @property
    def uses_client_certificates(self) -> bool:
        return self._state.value.config.mtls is not None

    def authenticate(self, metadata: Metadata, auth_context: AuthContext) -> Principal:
        """Who calls, at once. Raises Unauthenticated."""
        return self._state.value.chain.authenticate(metadata, auth_context)

    async def authenticate_patiently(self, metadata: Metadata, auth_context: AuthContext) -> Principal:
        """Who calls; a JWT whose key is being fetched waits for that. Raises Unauthenticated."""
        try:
            return self.authenticate(metadata, auth_context)
        except Unauthenticated as error:
            if error.fetch is None:
                raise
            fetch = error.fetch
        await asyncio.wait({asyncio.wrap_future(fetch)}, timeout=_MAX_FETCH_WAIT_S)
        return self.authenticate(metadata, auth_context)

    def poll(self) -> None:
        """Follow the files: the auth file, then those that it names. Blocks; see `run`."""
        if self._state.poll():
            _log.info("%s: read again", self._state.value.config.path)
        state = self._state.value
        if state.keys is not None:
            state.keys.poll()
        if state.jwt is not None:
            state.jwt.poll()

    async def run(self, seconds: float = 1.0) -> None:
        """Poll until cancelled."""
        await poll_every(seconds, self.poll)

    def _load(self, auth_file: Path) -> _State:
        config = load_auth_file(auth_file)
        keys = None if config.keys_file is None else WatchedKeys(config.keys_file, _keep)
        jwt = None if config.jwt is None else self._verifier(config.jwt)
        if keys is not None and jwt is None and config.mtls is None:
            _warn_of_strays(config, keys.tenants)
        return _State(config, keys, jwt, AuthChain(keys, jwt, config.mtls))

    def _verifier(self, config: JwtConfig) -> JwtVerifier:
        """The one in use while its table is unchanged: the issuer may be down, and then its keys are only there."""
        if self._last_jwt is None or self._last_jwt[0] != config:
            self._last_jwt = config, JwtVerifier.open(config, _keep, self._fetch)
        return self._last_jwt[1]


def _warn_of_strays(config: AuthConfig, tenants: frozenset[str]) -> None:
    """Name what the policy says of tenants that nobody can be, which a slip of the pen looks like."""
    policy = config.policy
    owners = {owner for owner, _ in policy.shared_with}
    guests = {guest for guests in policy.shared_with.values() for guest in guests}
    strays = [f"[tenants.{name}]" for name in sorted(policy.limits.keys() - tenants - owners)]
    strays += [f"share with {name}" for name in sorted(guests - tenants)]
    # adapters of the default tenant, or of one with a table of its own, can be folders that the operator put there
    known = {*tenants, *policy.limits, DEFAULT_TENANT}
    strays += [f"share of {owner}/{adapter}" for owner, adapter in sorted(policy.shared_with) if owner not in known]
    if strays:
        more = f" and {len(strays) - _MAX_NAMED} more" if len(strays) > _MAX_NAMED else ""
        names = ", ".join(strays[:_MAX_NAMED]) + more
        remedy = "correct the names, or make keys with `multilora keys create`"
        _log.warning("%s: no credential can be of the tenants in %s; %s", config.path, names, remedy)


def _keep(error: Exception) -> None:
    _log.error("what was read before stays in use: %s", error)
