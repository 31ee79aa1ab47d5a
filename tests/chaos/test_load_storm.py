"""Loads and unloads without pause while clients ask: no failed call, no wrong row."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
import torch

from server.pb.multilora.v1 import adapters_pb2
from tests.oracle import ALL_LINEAR, PeftOracle, make_adapter
from tests.service.harness import Harness, classify_request, running

TEXTS = ("the match was lost in the last minute", "a new chip", "rates rise again, and markets fall sharply")
NUM_CLIENTS, CALLS_EACH = 16, 80


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number in range(6):
        targets = ALL_LINEAR if number % 2 else ["query", "value"]
        make_adapter(
            tiny_bert, folder / f"a{number}", rank=2**number, targets=targets, num_labels=2 + number, seed=number
        )
    return folder


async def test_sixteen_clients_see_no_failure_and_no_other_adapters_answer(root: Path, tiny_bert: Path) -> None:
    oracles = [PeftOracle(tiny_bert, root / f"a{n}", 2 + n) for n in range(6)]
    expected = [[oracle.logits(text) for text in TEXTS] for oracle in oracles]
    async with running(root, base=str(tiny_bert), real=True, threads=1) as server:
        churner = asyncio.create_task(churn(server))
        await asyncio.gather(*(client(server, seed, expected) for seed in range(NUM_CLIENTS)))
        churner.cancel()
        loads = await server.sample("multilora_adapter_load_seconds_count")
        assert loads > 20, "the storm did not happen"
        assert await server.sample("multilora_admitted_sequences") == 0


async def client(server: Harness, seed: int, expected: list[list[torch.Tensor]]) -> None:
    for call in range(CALLS_EACH):
        number = (seed + call * 5) % len(expected)
        reply = await server.inference.Classify(classify_request(f"a{number}", *TEXTS, return_logits=True))
        for result, want in zip(reply.results, expected[number], strict=True):
            torch.testing.assert_close(torch.tensor(list(result.logits)), want, atol=1e-4, rtol=1e-4)


async def churn(server: Harness) -> None:
    for number in itertools.cycle(range(6)):
        await server.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter=f"a{number}"))
        await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter=f"a{number}", wait=True))
