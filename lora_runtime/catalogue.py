"""The adapters by name, and their aliases, as every thread may read them; the engine thread alone writes."""

from __future__ import annotations

import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterator
from dataclasses import replace

from lora_runtime.errors import AdapterAlreadyExists, AdapterInUse, AdapterNotFound, AliasNotFound, InvalidRequest
from lora_runtime.types import BASE_NAME, DEFAULT_ALIAS, AdapterId, AdapterInfo, AdapterRef, Alias

_Key = tuple[str, str, int]  # compared in C, ten times faster than AdapterId


class Catalogue:
    """Snapshots by id. Each change is one assignment of an immutable value, so a reader sees the old or the new."""

    def __init__(self, base: AdapterInfo) -> None:
        """`base` is what the reserved name resolves to, for every tenant; it is in no list."""
        self._base = base
        self._infos: dict[_Key, AdapterInfo] = {}
        self._order: tuple[_Key, ...] = ()  # of all, ascending; replaced, never changed
        self._aliases: dict[tuple[str, str], dict[str, Alias]] = {}  # by adapter; the inner ones are replaced

    def resolve(self, ref: AdapterRef, routing_key: str = "") -> AdapterInfo:
        """The adapter a caller means, the base only by its own name; never another adapter.

        `routing_key` decides a weighted alias; requests without one are drawn at random. Raises AdapterNotFound,
        AliasNotFound for an alias that a known adapter does not have.
        """
        if ref.name == BASE_NAME and ref.version in (None, self._base.id.version) and ref.alias == DEFAULT_ALIAS:
            return self._base
        version = ref.version
        if version is None:
            aliases = self._aliases.get((ref.tenant, ref.name), {})
            alias = aliases.get(ref.alias)
            if alias is None and aliases:
                raise AliasNotFound(str(ref))
            version = alias.choose(routing_key or uuid.uuid4().hex) if alias else 0
        info = self._infos.get((ref.tenant, ref.name, version)) if version else None
        if info is None:
            raise AdapterNotFound(str(ref))
        return info

    def get(self, adapter: AdapterId) -> AdapterInfo:
        """Raises AdapterNotFound."""
        info = self._base if adapter == self._base.id else self._infos.get(_key(adapter))
        if info is None:
            raise AdapterNotFound(str(adapter))
        return info

    def find(self, adapter: AdapterId) -> AdapterInfo | None:
        """One that was registered, None without it."""
        return self._infos.get(_key(adapter))

    def list(
        self,
        tenant: str | None,
        *,
        after: AdapterId | None = None,
        limit: int | None = None,
        matches: Callable[[AdapterInfo], bool] = lambda _: True,
    ) -> list[AdapterInfo]:
        """At most `limit` adapters of a tenant (None: of all) that follow `after`, by tenant, name and version."""
        found: list[AdapterInfo] = []
        for info in self._from(tenant, after):
            if len(found) == limit:
                break
            if matches(info):
                found.append(info)
        return found

    def __len__(self) -> int:
        return len(self._infos)

    def all(self) -> list[AdapterInfo]:
        """Every adapter, in order of registration."""
        return [*self._infos.values()]

    def versions(self, tenant: str, name: str) -> list[int]:
        """The registered versions of one adapter, ascending."""
        order = self._order
        first, last = bisect_left(order, (tenant, name, 0)), bisect_left(order, (tenant, name + "\0", 0))
        return [version for _, _, version in order[first:last]]

    def alias(self, tenant: str, name: str, alias: str) -> Alias:
        """Raises AdapterNotFound, AliasNotFound."""
        aliases = self._aliases.get((tenant, name))
        if aliases is None:
            raise AdapterNotFound(f"{tenant}/{name}")
        if alias not in aliases:
            raise AliasNotFound(f"{tenant}/{name}@{alias}")
        return aliases[alias]

    def aliases(self, tenant: str | None = None, name: str | None = None) -> list[Alias]:
        """Of one adapter, `default` first; of all adapters without a name, of a tenant's or of everybody's."""
        if tenant is not None and name is not None:
            kinds = [self._aliases.get((tenant, name), {})]
        else:
            kinds = [known for (owner, _), known in [*self._aliases.items()] if tenant in (None, owner)]
        return [alias for known in kinds for alias in sorted(known.values(), key=_default_first)]

    def aliases_of(self, adapter: AdapterId) -> list[str]:
        """Names of the aliases that lead to a version, `default` first."""
        known = self._aliases.get((adapter.tenant, adapter.name), {})
        return [a.name for a in sorted(known.values(), key=_default_first) if adapter.version in a.versions]

    def moved_alias(self, alias: Alias) -> Alias:
        """The alias as it will be once it is moved: what it led to becomes its previous version.

        Raises AdapterNotFound for a version that is not registered, InvalidRequest for a wrong share.
        """
        for version in alias.versions:
            self.get(AdapterId(alias.tenant, alias.adapter, version))
        if alias.canary_version is not None:
            if alias.canary_version == alias.version:
                raise InvalidRequest("canary_version", f"{alias.version} is the alias's own version; name another")
            if not 0 < alias.canary_percent < 100:
                raise InvalidRequest("canary_percent", f"{alias.canary_percent:g} is not between 0 and 100")
        before = self._aliases.get((alias.tenant, alias.adapter), {}).get(alias.name)
        if before is None:
            return replace(alias, previous_version=None)
        moves = before.version != alias.version
        return replace(alias, previous_version=before.version if moves else before.previous_version)

    # The engine thread

    def check_free(self, adapter: AdapterId, also: Container[AdapterId] = ()) -> None:
        """Raises AdapterAlreadyExists when the id is registered or in `also`."""
        if _key(adapter) in self._infos or adapter in also:
            raise AdapterAlreadyExists(str(adapter))

    def put(self, info: AdapterInfo) -> Alias | None:
        """Publish a snapshot; the alias `default` when this first version of an adapter brought it about."""
        adapter = info.id
        key = _key(adapter)
        is_new = key not in self._infos
        self._infos[key] = info
        if not is_new:
            return None
        at = bisect_left(self._order, key)
        self._order = (*self._order[:at], key, *self._order[at:])
        if (adapter.tenant, adapter.name) in self._aliases:
            return None
        first = Alias(adapter.tenant, adapter.name, DEFAULT_ALIAS, adapter.version)
        self._aliases[adapter.tenant, adapter.name] = {DEFAULT_ALIAS: first}
        return first

    def check_removable(self, adapter: AdapterId) -> None:
        """Raises AdapterInUse while an alias would lead nowhere."""
        last = len(self.versions(adapter.tenant, adapter.name)) == 1
        held = [name for name in self.aliases_of(adapter) if not (last and name == DEFAULT_ALIAS)]
        if held:
            raise AdapterInUse(str(adapter), f"has the alias {held[0]!r}; move or remove that first")

    def remove(self, adapter: AdapterId) -> list[Alias]:
        """Forget a version; the aliases that went with it, because they led to nothing else."""
        del self._infos[_key(adapter)]
        at = bisect_left(self._order, _key(adapter))
        self._order = self._order[:at] + self._order[at + 1 :]
        owner = adapter.tenant, adapter.name
        left = {name: alias for name, alias in self._aliases[owner].items() if adapter.version not in alias.versions}
        gone = [alias for name, alias in self._aliases[owner].items() if name not in left]
        if left:
            self._aliases[owner] = left
        else:
            del self._aliases[owner]
        return gone

    def put_alias(self, alias: Alias) -> None:
        """Publish an alias, in one assignment; raises AdapterNotFound for a version that is not registered."""
        for version in alias.versions:
            self.get(AdapterId(alias.tenant, alias.adapter, version))
        owner = alias.tenant, alias.adapter
        self._aliases[owner] = {**self._aliases.get(owner, {}), alias.name: alias}

    def remove_alias(self, alias: Alias) -> None:
        """Raises InvalidRequest for `default`."""
        if alias.name == DEFAULT_ALIAS:
            raise InvalidRequest("alias", "default cannot be removed: a bare name follows it")
        owner = alias.tenant, alias.adapter
        self._aliases[owner] = {name: kept for name, kept in self._aliases[owner].items() if name != alias.name}

    def _from(self, tenant: str | None, after: AdapterId | None) -> Iterator[AdapterInfo]:
        order = self._order
        first = 0 if tenant is None else bisect_left(order, (tenant, "", 0))
        last = len(order) if tenant is None else bisect_left(order, (tenant + "\0", "", 0))
        if after is not None:
            first = max(first, bisect_right(order, _key(after)))
        infos = self._infos
        for key in order[first:last]:
            if (info := infos.get(key)) is not None:  # else removed meanwhile
                yield info


def _key(adapter: AdapterId) -> _Key:
    return adapter.tenant, adapter.name, adapter.version


def _default_first(alias: Alias) -> tuple[bool, str]:
    return alias.name != DEFAULT_ALIAS, alias.name
