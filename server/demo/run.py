"""The whole demo: train, serve, load while it runs, ask, measure, show."""

from __future__ import annotations

import asyncio
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from server.bench.measure import OutputsDiffer
from server.demo.process import ServerProcess
from server.demo.samples import SAMPLE_NAMES, load_sample
from server.demo.share import measure_base_share
from server.demo.show import print_calls, print_table
from server.demo.traffic import Stream, classify, load_adapter, mixed_stream
from server.demo.training import Trained, accuracy, settings_for, train
from server.train_cli.progress import TrainProgress


@dataclass(frozen=True, slots=True)
class Served:
    """One adapter behind the server."""

    trained: Trained
    accuracy: float  # of the held-out rows, over gRPC
    answers: list[str]


def run_demo(
    base: str, folder: Path, threads: int, stream_seconds: float, port: int | None, keep: bool, console: Console
) -> None:
    """Everything is written under `folder`. With `keep`, returns when the server is stopped by hand."""
    server_at = ServerProcess(base, folder / "adapters", threads, port)  # a port in use is found before training
    console.rule("1. train three adapters on one base, each with labels of its own")
    trained = [_train(name, base, folder, threads, console) for name in SAMPLE_NAMES]
    console.rule("2. start the server, without adapters")
    root = folder / "adapters"
    root.mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(server_at)
        console.print(f"multilora serve is SERVING on {server.target}, metrics on {server.metrics_url}")
        console.rule("3. load the adapters over gRPC while it runs")
        served = [asyncio.run(_serve(server, item, root, console)) for item in trained]
        console.rule(f"4. a mixed stream for {stream_seconds:.0f} seconds, a text per request")
        stream = asyncio.run(_stream(server, served, stream_seconds))
        if stream.wrong:
            raise OutputsDiffer(f"{stream.wrong} answers of the mixed stream differ from the adapter's own")
        if not keep:
            stack.close()  # the ratio is measured with the machine to itself
        console.rule("5. mixed batches against the base alone, without a server")
        work = [(root / item.trained.name, [row.text for row in item.trained.sample.test]) for item in served]
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # training has left threads of its own here
            share = alone.submit(measure_base_share, base, work, threads).result()
        print_table(console, served, stream, share)
        print_calls(console, served[0].trained.name, server if keep else None)
        if keep:
            _wait(server, console)


def _train(name: str, base: str, folder: Path, threads: int, console: Console) -> Trained:
    sample = load_sample(name)
    settings = settings_for(sample, base, folder, threads)
    console.print(f"[bold]{name}[/]")
    with TrainProgress(console, settings) as progress:
        return train(sample, settings, progress)


async def _serve(server: ServerProcess, item: Trained, root: Path, console: Console) -> Served:
    shutil.move(item.report.out, root / item.name)
    seconds = await load_adapter(server.target, item.name)
    answers = await classify(server.target, item.name, [row.text for row in item.sample.test])
    right = accuracy(answers, [row.label for row in item.sample.test])
    console.print(f"{item.name}: loaded in {1000 * seconds:.0f} ms, {len(item.sample.labels)} labels")
    return Served(item, right, answers)


async def _stream(server: ServerProcess, served: list[Served], seconds: float) -> Stream:
    work = {
        item.trained.name: [
            (row.text, answer) for row, answer in zip(item.trained.sample.test, item.answers, strict=True)
        ]
        for item in served
    }
    return await mixed_stream(server.target, server.metrics_url, work, seconds)


def _wait(server: ServerProcess, console: Console) -> None:
    console.print("the server keeps running; stop it with Ctrl-C")
    try:
        code = server.wait()
        console.print(f"the server ended with exit code {code}")
    except KeyboardInterrupt:
        console.print("stopping the server")


def default_threads() -> int:
    """As many as there are cores, and no more than eight: the texts are short."""
    return min(os.cpu_count() or 1, 8)
