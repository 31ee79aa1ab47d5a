"""What a connection that TLS did not let through says: gRPC tells it inside a long line, and not always which side."""

from __future__ import annotations

import re

_UNVERIFIED = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]+)")
_TLS_CAUSE = re.compile(r"[Hh]andshake failed.*?: ?(?:SSL_ERROR_SSL: )?(.+)")
_CLOSED = ("Socket closed", "Connection reset by peer", "Broken pipe")


def handshake_fault(details: str, server: str, uses_tls: bool) -> str | None:
    """One line of cause and remedy; None when `details` of the status tell of no TLS fault."""
    if "failed to connect" not in details:
        return None
    if any(text in details for text in _CLOSED):
        return _closed(server, uses_tls)
    cause = _cause(details)
    return None if cause is None else f"TLS handshake with {server} failed: {cause}"


def _closed(server: str, uses_tls: bool) -> str:
    """A side that refuses a handshake just closes the connection."""
    if uses_tls:
        cause = "it closed the connection, as a server does that wants a client certificate, or another one"
        return f"TLS handshake with {server} failed: {cause}; see --tls-cert and --tls-key"
    return f"{server} closed the connection, as a server does that speaks TLS alone; see --tls-ca and --tls"


def _cause(details: str) -> str | None:
    if (unverified := _UNVERIFIED.search(details)) is not None:
        reason = unverified[1].strip()
        is_dated = "expired" in reason or "not yet valid" in reason
        remedy = "renew it at the server" if is_dated else "name the CA that signed it with --tls-ca"
        return f"the server's certificate is not trusted ({reason}); {remedy}"
    if "Hostname Verification Check failed" in details:
        return "the server's certificate is for another host; use a name that is in it with --server"
    if "WRONG_VERSION_NUMBER" in details:
        return "the server does not speak TLS; leave out --tls, --tls-ca, --tls-cert and --tls-key"
    if "create security handshaker" in details:
        return "a certificate or key cannot be read; see --tls-ca, --tls-cert and --tls-key"
    other = _TLS_CAUSE.search(details)
    return None if other is None else f"{other[1]}; see --tls-ca"
