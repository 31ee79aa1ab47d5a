"""Tenants as the server knows them: principals, roles, limits, and the policy that says who has which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from lora_runtime.types import DEFAULT_TENANT


class Role(StrEnum):
    """What a caller may do; roles are independent of each other."""

    INFER = "infer"  # ask its tenant's adapters, and those shared with it
    ADAPTERS = "adapters"  # register, load, alias and delete its tenant's own adapters
    OPERATOR = "operator"  # everything, of every tenant


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a tenant, and what the credential allows."""

    tenant: str
    roles: frozenset[Role]
    name: str  # of the credential, for the audit log: a key's id, a token's subject, a certificate's name; no secret

    def has(self, role: Role) -> bool:
        return role in self.roles or Role.OPERATOR in self.roles


ANYBODY = Principal(DEFAULT_TENANT, frozenset({Role.OPERATOR}), "anybody")  # without authentication


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one tenant. None: no limit but the server's own."""

    weight: float = 1.0  # share of the engine while others wait too
    requests_per_second: float | None = None
    tokens_per_minute: float | None = None
    max_concurrent_requests: int | None = None
    max_queued_sequences: int | None = None
    max_resident_bytes: int | None = None  # of the arena


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits and shares of all tenants; replaced as a whole when its file changes."""

    default_limits: Limits = Limits()
    limits: Mapping[str, Limits] = field(default_factory=dict[str, Limits])  # by tenant
    shared_with: Mapping[tuple[str, str], frozenset[str]] = field(  # (owner, adapter) → tenants that may ask it
        default_factory=dict[tuple[str, str], frozenset[str]]
    )

    def limits_of(self, tenant: str) -> Limits:
        return self.limits.get(tenant, self.default_limits)

    def may_ask(self, principal: Principal, owner: str, adapter: str) -> bool:
        """Whether a principal may ask an adapter of `owner`: its own, a shared one, or any for an operator."""
        return (
            principal.tenant == owner
            or Role.OPERATOR in principal.roles
            or principal.tenant in self.shared_with.get((owner, adapter), frozenset())
        )
