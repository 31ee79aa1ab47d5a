"""The door of the server: an auth file, or nobody is asked; and what tenants get by its policy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from lora_runtime.shares import Shares
from server.tenancy.authenticate import AuthContext, Metadata, NoAuthentication
from server.tenancy.identity import Identity
from server.tenancy.model import Policy, Principal

NO_AUTH = "none"


class Gate:
    """Who may come in. Raises AuthFileError at the start; later changes of the file apply by themselves."""

    def __init__(self, auth: str) -> None:
        """`auth`: an auth file, or `none`."""
        self._identity = None if auth == NO_AUTH else Identity(Path(auth))
        self._open_policy = Policy()

    @property
    def is_open(self) -> bool:
        """Whether anybody may call."""
        return self._identity is None

    @property
    def policy(self) -> Policy:
        return self._open_policy if self._identity is None else self._identity.policy

    @property
    def uses_client_certificates(self) -> bool:
        return self._identity is not None and self._identity.uses_client_certificates

    async def authenticate(self, metadata: Metadata, auth_context: AuthContext) -> Principal:
        """Who calls. Raises Unauthenticated."""
        if self._identity is None:
            return NoAuthentication().authenticate(metadata, auth_context)
        return await self._identity.authenticate_patiently(metadata, auth_context)

    async def run(self) -> None:
        """Follow the auth file and those it names, until cancelled."""
        if self._identity is None:
            await asyncio.Event().wait()
        else:
            await self._identity.run()


class PolicyShares(Shares):
    """Weights and quotas of the policy as it is now; asked from the engine's thread."""

    def __init__(self, policy: Callable[[], Policy]) -> None:
        self._policy = policy

    def weight_of(self, tenant: str) -> float:
        return self._policy().limits_of(tenant).weight

    def resident_bytes_of(self, tenant: str) -> int | None:
        return self._policy().limits_of(tenant).max_resident_bytes
