"""The adapters by name, as every thread may read them; the engine thread alone writes."""

from __future__ import annotations

from collections.abc import Container

from lora_runtime.errors import AdapterAlreadyExists, AdapterNotFound
from lora_runtime.types import BASE_NAME, AdapterId, AdapterInfo, AdapterRef


class Catalogue:
    """Snapshots by id. Each change is one assignment of an immutable value, so a reader sees the old or the new."""

    def __init__(self, base: AdapterInfo) -> None:
        """`base` is what the reserved name resolves to, for every tenant; it is in no list."""
        self._base = base
        self._infos: dict[AdapterId, AdapterInfo] = {}
        self._default: dict[tuple[str, str], int] = {}  # the alias `default`: the first version that was registered

    def resolve(self, ref: AdapterRef) -> AdapterInfo:
        """The adapter a caller means, the base only by its own name; raises AdapterNotFound, never another adapter."""
        if ref.name == BASE_NAME and ref.version in (None, self._base.id.version):
            return self._base
        version = ref.version if ref.version is not None else self._default.get((ref.tenant, ref.name))
        info = None
        if version is not None and (ref.tenant, ref.name) in self._default:
            info = self._infos.get(AdapterId(ref.tenant, ref.name, version))
        if info is None:
            raise AdapterNotFound(str(ref))
        return info

    def get(self, adapter: AdapterId) -> AdapterInfo:
        """Raises AdapterNotFound."""
        info = self._base if adapter == self._base.id else self._infos.get(adapter)
        if info is None:
            raise AdapterNotFound(str(adapter))
        return info

    def list(self, tenant: str) -> list[AdapterInfo]:
        """One tenant's adapters by name and version."""
        return sorted((i for i in self.all() if i.id.tenant == tenant), key=lambda info: info.id)

    def all(self) -> list[AdapterInfo]:
        """Every adapter, in order of registration."""
        return [*self._infos.values()]

    def versions(self, tenant: str, name: str) -> list[int]:
        """The registered versions of one adapter, ascending."""
        return [info.id.version for info in self.list(tenant) if info.id.name == name]

    def check_free(self, adapter: AdapterId, also: Container[AdapterId] = ()) -> None:
        """Raises AdapterAlreadyExists when the id is registered or in `also`."""
        if adapter in self._infos or adapter in also:
            raise AdapterAlreadyExists(str(adapter))

    def put(self, info: AdapterInfo) -> None:
        """Publish a snapshot; for the engine thread."""
        self._infos[info.id] = info
        self._default.setdefault((info.id.tenant, info.id.name), info.id.version)
