"""What tenants get of an engine that they share."""

from __future__ import annotations


class Shares:
    """What a tenant gets of the engine while others want it too; here the same for all, without bounds."""

    def weight_of(self, tenant: str) -> float:
        """More than 0."""
        del tenant
        return 1.0

    def resident_bytes_of(self, tenant: str) -> int | None:
        """Bytes of the arena that its adapters may hold together, None for no bound."""
        del tenant
        return None
