"""Where an adapter's files may come from, and how that is told to clients: never a path of the server's disk."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterId, AdapterInfo
from server.control.state import Registration
from server.control.uploads import stored_folder

UPLOAD = "upload"


class Places:
    """The adapter root, the URLs a client may name, and the folder of uploads."""

    def __init__(self, root: str, allowed_urls: tuple[str, ...], state: Path | None) -> None:
        self._root = None if "://" in root else Path(root).resolve()
        self._root_as_given = Path(root).absolute()  # how a scan names its folders
        self._allowed_urls = allowed_urls
        self._state = state

    def check_url(self, url: str, tenant: str) -> None:
        """Raise InvalidRequest on field `source` unless the operator allows the URL to a tenant.

        A prefix with `{tenant}` is each tenant's own; one without is everybody's.
        """
        prefixes = [prefix.replace("{tenant}", tenant) for prefix in self._allowed_urls]
        inside = any(url == prefix or url.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)
        # as clients of stores read it: they resolve %2e%2e, take a backslash for a slash, and chain URLs by "::"
        plain = unquote(url).replace("\\", "/")
        if not inside or ".." in PurePosixPath(plain).parts or "::" in plain or not plain.isprintable():
            allowed = ", ".join(self._allowed_urls) or "none"
            raise InvalidRequest(
                "source",
                f"{url[:200]!r} is under no URL that this server takes adapters from ({allowed}; see --sources)",
            )

    def folder(self, source: str, tenant: str | None = None) -> Path:
        """The folder `source` names below the root; raises InvalidRequest on field `source`.

        With `tenant` it must lie below the folder of that name: what lies elsewhere may be another tenant's, and is
        treated as what is not there. Nothing outside the root is read or revealed: `..`, absolute paths and links that
        lead out are refused before the file system is asked whether they exist.
        """
        shown = f"{source[:200]!r}"
        if self._root is None:
            raise InvalidRequest("source", f"{shown} is no URL, and this server has no folder of adapters")
        parts = PurePosixPath(source)
        if not source or "\0" in source or parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise InvalidRequest(
                "source", f"{shown} is no relative path; name a folder under the server's adapter root"
            )
        _require_own(shown, tenant, tenant is None or parts.parts[0] == tenant)
        try:
            folder = (self._root / parts).resolve()
            _require_own(shown, tenant, tenant is None or self._root / tenant in folder.parents)
            inside = folder.is_relative_to(self._root) and folder != self._root
            found = inside and folder.is_dir()
        except (OSError, RuntimeError) as error:  # a name too long, a loop of links
            raise InvalidRequest("source", f"{shown} is no readable folder under the server's adapter root") from error
        if not inside:
            raise InvalidRequest("source", f"{shown} leads out of the server's adapter root; copy the folder into it")
        if not found:
            message = f"{shown} is not a folder under the server's adapter root; put the adapter there first"
            raise InvalidRequest("source", message)
        return folder

    def registration(self, adapter: AdapterId, origin: Origin) -> Registration:
        """What to keep of a registration: folders by their place under the root, which may move."""
        path = origin.path
        url = origin.url if path is None or self._root is None else path.relative_to(self._root).as_posix()
        return Registration(adapter, url, origin.revision, uploaded=False)

    def origin(self, kept: Registration) -> Origin:
        """Where the files of a registration that was kept are now; raises InvalidRequest where that cannot be said."""
        if kept.uploaded:
            return Origin(str(self.stored(kept.id)))
        if "://" in kept.url:
            return Origin(kept.url, kept.revision)
        if self._root is None:
            raise InvalidRequest(
                "source", f"{kept.url!r} is a folder of an adapter root that this server does not have"
            )
        return Origin(str(self._root / kept.url))

    def stored(self, adapter: AdapterId) -> Path:
        """Where the files of an upload lie; only with a state directory."""
        assert self._state is not None, "uploads need a state directory"
        return stored_folder(self._state, adapter)

    def is_upload(self, info: AdapterInfo) -> bool:
        """Whether the server keeps an adapter's files itself."""
        return self._state is not None and Path(info.source) == self.stored(info.id)

    def shown(self, info: AdapterInfo) -> str:
        """An adapter's source, as clients may see it."""
        if "://" in info.source or info.id.is_base:
            return str(Origin(info.source, info.revision))
        path = Path(info.source)
        if self.is_upload(info):
            return UPLOAD
        path = path.absolute()
        for root in (self._root, self._root_as_given):
            if root is not None and path.is_relative_to(root):
                return path.relative_to(root).as_posix()
        return path.name


def _require_own(shown: str, tenant: str | None, is_own: bool) -> None:
    if not is_own:
        message = f"{shown} is no folder below {tenant}/ of the server's adapter root; put the adapter there"
        raise InvalidRequest("source", message)
