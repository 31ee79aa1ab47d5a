"""`--connection-age`: clients connect anew, and so find replicas that came later; no call is lost by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from tests.service.harness import classify_request, running


async def test_an_old_connection_ends_once_its_calls_are_answered(adapter_root: Path) -> None:
    async with running(adapter_root, connection_age=0.5) as server:
        await server.channel.channel_ready()
        server.engine.gate.clear()
        call = server.inference.Classify(classify_request("spam", "one"))
        await asyncio.wait_for(server.channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 5)
        assert not call.done()
        server.engine.gate.set()
        assert len((await call).results) == 1
        assert len((await server.inference.Classify(classify_request("spam", "one"))).results) == 1


async def test_a_connection_stays_open_where_no_age_is_given(adapter_root: Path) -> None:
    async with running(adapter_root) as server:
        await server.channel.channel_ready()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 1.2)
