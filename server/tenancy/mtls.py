"""Client certificates, as principals. gRPC has verified them against the client CA before any of this is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_runtime.errors import InvalidRequest, shown
from lora_runtime.types import check_name
from server.tenancy.auth_file import MtlsConfig
from server.tenancy.model import Principal

_SPIFFE = "spiffe://"
_MAX_NAME_CHARS = 200


def principal_of_certificate(auth_context: Mapping[str, Iterable[bytes]], config: MtlsConfig) -> Principal | None:
    """Whose certificate a connection was opened with; None without one, or if it names no tenant.

    The tenant is NAME of `spiffe://domain/tenant/NAME/…`, or the subject's common name. A certificate with a SPIFFE URI
    that is not accepted is refused: its common name then says nothing either.
    """
    if b"ssl" not in auth_context.get("transport_security_type", ()):
        return None
    uris = _spiffe_uris(auth_context)
    if config.tenant_from == "spiffe" or (config.tenant_from is None and uris):
        tenant = _tenant_of_spiffe(uris, config.trust_domain)
        name = uris[0] if uris else ""
    else:
        names = _texts(auth_context, "x509_common_name")
        tenant = names[0] if len(names) == 1 else None
        name = tenant or ""
    if tenant is None or not _is_name(tenant):
        return None
    return Principal(tenant, config.roles, shown(name[:_MAX_NAME_CHARS]))


def _spiffe_uris(auth_context: Mapping[str, Iterable[bytes]]) -> list[str]:
    # gRPC lists alternative names of all kinds as one; a DNS name or an address must not pass for a URI
    others = {*_texts(auth_context, "peer_dns"), *_texts(auth_context, "peer_email")}
    names = _texts(auth_context, "x509_subject_alternative_name")
    return [name for name in names if name.lower().startswith(_SPIFFE) and name not in others]


def _tenant_of_spiffe(uris: list[str], trust_domain: str | None) -> str | None:
    """NAME of `spiffe://domain/tenant/NAME/…`; a certificate with two such URIs is refused, as X.509-SVID demands."""
    if len(uris) != 1:
        return None
    domain, *path = uris[0].removeprefix(_SPIFFE).split("/")
    if not domain or domain != (trust_domain or domain):
        return None
    return path[1] if len(path) >= 2 and path[0] == "tenant" else None


def _texts(auth_context: Mapping[str, Iterable[bytes]], key: str) -> list[str]:
    return [value.decode("ascii", "replace") for value in auth_context.get(key, ())]


def _is_name(value: str) -> bool:
    try:
        check_name("tenant", value)
    except InvalidRequest:
        return False
    return True
