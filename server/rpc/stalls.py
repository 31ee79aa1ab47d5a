"""Streams whose client does not read."""

from __future__ import annotations

import asyncio
from typing import Any

from lora_runtime.errors import MultiloraError
from server.rpc.context import Context


class StreamStalled(MultiloraError):
    """A client did not read what it was sent, so the stream is ended and nothing more is generated for it."""

    reason = "STREAM_STALLED"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"nothing of the stream was read for {seconds:g} seconds; read it as it comes, or ask without a stream",
            limit_s=f"{seconds:g}",
        )


async def write(context: Context, reply: Any, stall_s: float | None) -> None:
    """Send a message; raises StreamStalled when the client leaves no room for it within `stall_s`, None: ever."""
    try:
        async with asyncio.timeout(stall_s):
            await context.write(reply)
    except TimeoutError as error:
        assert stall_s is not None, "without a limit nothing times out"
        raise StreamStalled(stall_s) from error
