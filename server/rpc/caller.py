"""Who makes the call that is being answered, and what that allows: rights, checked before anything is revealed."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lora_runtime.catalogue import Catalogue
from lora_runtime.errors import AdapterNotFound, InvalidRequest, MultiloraError
from lora_runtime.types import BASE_NAME, DEFAULT_ALIAS, AdapterInfo, AdapterRef, check_name
from server.tenancy.authenticate import AuthContext, Metadata
from server.tenancy.model import Policy, Principal, Role


class PermissionDenied(MultiloraError):
    """The caller's credential lacks a role. Which tenants and adapters there are is not told by that."""

    reason = "PERMISSION_DENIED"

    def __init__(self, needed: str) -> None:
        super().__init__(f"the credential does not allow this; it needs the role '{needed}'", role=needed)


@dataclass(slots=True)
class CallInfo:
    """One RPC, for rights and for the audit log."""

    principal: Principal
    policy: Policy
    metadata: Metadata = ()  # with `auth_context`, what the principal was made of
    auth_context: AuthContext = field(default_factory=dict[str, Any])
    target: str = ""  # the adapter it is about
    versions: str = ""  # where an alias is to lead
    is_denied: bool = False  # it named what is another tenant's, or nobody's
    work: dict[str, float] = field(default_factory=dict[str, float])  # what an answer took, for the access log


_NAMING = ("adapter", "name", "model_name")  # fields of requests

current_call: ContextVar[CallInfo] = ContextVar("current_call")


def caller() -> Principal:
    """Who makes this call."""
    return current_call.get().principal


def require(*roles: Role) -> Principal:
    """The caller, who has one of `roles`; raises PermissionDenied."""
    principal = caller()
    if not any(principal.has(role) for role in roles):
        raise PermissionDenied(roles[0])
    return principal


def aim_at(target: str) -> None:
    """Note what the call is about, for the audit log."""
    current_call.get().target = target


def note_work(**amounts: float) -> None:
    """Note what the call took, for the access log."""
    current_call.get().work.update(amounts)


def aim_alias(version: int, canary_version: int, canary_percent: float) -> None:
    """Note where an alias is to lead, for the audit log; 0 is no canary."""
    canary = f", canary {canary_version} at {canary_percent:g}%" if canary_version else ""
    current_call.get().versions = f"{version}{canary}"


def aim_at_named(request: Any) -> None:
    """As `aim_at` for the adapter that a request names, before anything is looked up; nothing where it names none."""
    text = next((text for name in _NAMING if (text := getattr(request, name, ""))), "")
    tenant = getattr(request, "tenant", "")
    try:
        if text:
            aim_at(_resource_name(AdapterRef.parse(text, caller().tenant)))
        elif tenant not in ("", "-"):
            check_name("tenant", tenant)
            aim_at(f"tenants/{tenant}")
    except InvalidRequest:
        return


def resolve(catalogue: Catalogue, reference: str, routing_key: str = "") -> AdapterInfo:
    """The adapter that the caller may ask and means.

    Another tenant's that is not shared does not exist for it. Raises InvalidRequest on field `adapter`,
    AdapterNotFound, AliasNotFound.
    """
    ref = parse_reference(reference)
    call = current_call.get()
    if ref.name != BASE_NAME and not call.policy.may_ask(call.principal, ref.tenant, ref.name):
        call.is_denied = True
        raise AdapterNotFound(str(ref))
    info = catalogue.resolve(ref, routing_key)
    aim_at(info.id.resource_name)
    return info


def resolve_own(catalogue: Catalogue, reference: str) -> AdapterInfo:
    """As `resolve`, of an adapter that the caller may change."""
    ref = parse_reference(reference)
    if ref.name != BASE_NAME:
        check_own(ref.tenant, str(ref))
    info = catalogue.resolve(ref)
    aim_at(info.id.resource_name)
    return info


def parse_reference(reference: str) -> AdapterRef:
    """Raises InvalidRequest on field `adapter`."""
    if not reference:
        raise InvalidRequest("adapter", "is empty; name the adapter")
    return AdapterRef.parse(reference, caller().tenant)


def check_own(tenant: str, shown: str) -> None:
    """Raise AdapterNotFound unless the caller may change what belongs to `tenant`."""
    principal = caller()
    if principal.tenant != tenant and not principal.has(Role.OPERATOR):
        current_call.get().is_denied = True
        raise AdapterNotFound(shown)


def parse_adapter(field: str, text: str) -> tuple[str, str]:
    """Tenant and name of an adapter that the caller may change; raises InvalidRequest on `field`, AdapterNotFound."""
    if not text:
        raise InvalidRequest(field, "is empty; name the adapter")
    try:
        ref = AdapterRef.parse(text, caller().tenant)
    except InvalidRequest as error:
        raise error.at(field) from error
    if ref.version is not None or "@" in text or "/aliases/" in text:
        raise InvalidRequest(field, f"{text[:140]!r} names a version or an alias; give the adapter's name alone")
    if ref.name == BASE_NAME:
        raise InvalidRequest(field, f"{BASE_NAME!r} is reserved for the base model")
    aim_at(_resource_name(ref))
    check_own(ref.tenant, str(ref))
    return ref.tenant, ref.name


def tenant_filter(tenant: str) -> str | None:
    """The tenant that a listing is about, None for all; raises InvalidRequest on field `tenant`, PermissionDenied."""
    principal = caller()
    if tenant not in ("", "-"):
        check_name("tenant", tenant)
    if tenant not in ("", principal.tenant) and not principal.has(Role.OPERATOR):
        raise PermissionDenied(Role.OPERATOR)
    return None if tenant == "-" else tenant or principal.tenant


def _resource_name(ref: AdapterRef) -> str:
    name = f"tenants/{ref.tenant}/adapters/{ref.name}"
    if ref.version is not None:
        return f"{name}/versions/{ref.version}"
    return name if ref.alias == DEFAULT_ALIAS else f"{name}/aliases/{ref.alias}"
