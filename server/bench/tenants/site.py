"""What a server with tenants is started from: an auth file, a key for each tenant, an adapter for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.bench.adapters.folders import Weights
from server.bench.tenants.plan import (
    ADAPTER,
    BOUNDED,
    BOUNDED_SEQUENCES,
    LIMITED,
    LIMITED_CALLS,
    TENANTS,
    WEIGHTS,
)
from server.tenancy.keys import KeyStore, utc_now
from server.tenancy.model import Role


@dataclass(frozen=True, slots=True)
class Site:
    """Paths, and the keys by tenant."""

    root: Path
    auth: Path
    keys: Mapping[str, str]

    @classmethod
    def make(cls, folder: Path, weights: Weights) -> Site:
        """Tenant number n has the weights of file n: an answer of another tenant's adapter is a wrong one."""
        root = folder / "adapters"
        for tenant, file in zip(TENANTS, weights.files, strict=True):
            weights.template.write_folder(root / tenant / ADAPTER / "1", file)
        store = KeyStore(folder / "keys.json")
        keys = {tenant: store.create(tenant, [Role.INFER], utc_now())[0] for tenant in TENANTS}
        auth = folder / "auth.toml"
        auth.write_text(_auth_text(), encoding="utf-8")
        return cls(root, auth, keys)


def _auth_text() -> str:
    lines = ["[keys]", 'file = "keys.json"']
    lines += [line for tenant, weight in WEIGHTS.items() for line in (f"[tenants.{tenant}]", f"weight = {weight}")]
    lines += [f"[tenants.{LIMITED}]", f"max_concurrent_requests = {LIMITED_CALLS}"]
    for tenant in BOUNDED:
        lines += [f"[tenants.{tenant}]", f"max_queued_sequences = {BOUNDED_SEQUENCES}"]
    return "\n".join([*lines, ""])
