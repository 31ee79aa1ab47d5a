"""The gRPC context of a call, as far as RPCs need it."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

from grpc import aio

# Interceptors and helpers see every method, so its message types are left open.
Context: TypeAlias = aio.ServicerContext[Any, Any]


def remaining_seconds(context: Context) -> float | None:
    """Seconds until the caller's deadline, None without one (which the type stubs of grpc deny)."""
    return cast("float | None", context.time_remaining())
