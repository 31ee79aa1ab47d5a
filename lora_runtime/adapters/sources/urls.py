"""The scheme of a URL, and how it is shown to people: never with a credential in it."""

from __future__ import annotations

LOCAL = ""  # the scheme of a path


def scheme_of(url: str) -> str:
    """Lower case, without `://`; LOCAL for a path."""
    scheme, found, _ = url.partition("://")
    return scheme.lower() if found else LOCAL


def shown_url(url: str) -> str:
    """Without user, password, query and fragment; a path as it is."""
    scheme, found, rest = url.partition("://")
    if not found:
        return url
    host, slash, path = rest.partition("/")
    path = path.partition("?")[0].partition("#")[0]
    host = host.partition("?")[0].partition("#")[0].rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}"
