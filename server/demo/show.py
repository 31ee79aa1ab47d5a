"""What the demo prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.table import Table

from server.bench.measure import Spread
from server.demo.process import ServerProcess
from server.demo.traffic import Stream
from server.demo.training import Trained


class _Served(Protocol):
    @property
    def trained(self) -> Trained: ...
    @property
    def accuracy(self) -> float: ...


def print_table(console: Console, served: Sequence[_Served], stream: Stream, share: Spread) -> None:
    """One row per adapter, then what they share."""
    table = Table(title="three adapters, one resident base, mixed batches")
    for heading in ("adapter", "labels", "held-out accuracy", "under PEFT alone", "always the commonest", "requests/s"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    for item in served:
        trained = item.trained
        rate = stream.answered[trained.name] / stream.seconds
        shares = [f"{100 * value:.1f} %" for value in (item.accuracy, trained.peft_accuracy, trained.majority)]
        table.add_row(trained.name, str(len(trained.sample.labels)), *shares, f"{rate:.0f}")
    console.print(table)
    total = sum(stream.answered.values())
    console.print(
        f"mixed stream: {total} requests in {stream.seconds:.1f} s ({total / stream.seconds:.0f} requests/s), "
        f"every answer the adapter's own; {stream.adapters_per_batch:.1f} distinct adapters per batch"
    )
    console.print(
        f"mixed batches run at {share.median:.2f} of the base alone "
        f"({share.low:.2f} to {share.high:.2f} over interleaved rounds)"
    )


def print_calls(console: Console, adapter: str, server: ServerProcess | None) -> None:
    """How to call the server by hand: the one that runs, or one that is left running the next time."""
    console.rule("call it by hand")
    target = "127.0.0.1:50051" if server is None else server.target
    request = f'{{"adapter": "{adapter}", "inputs": [{{"text": "You won a prize, call now"}}], "top_k": 1}}'
    python = f"""\
import grpc
from server.pb.multilora.v1 import inference_pb2, inference_pb2_grpc

stub = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel("{target}"))
text = inference_pb2.TextInput(text="You won a prize, call now")
print(stub.Classify(inference_pb2.ClassifyRequest(adapter="{adapter}", inputs=[text])))"""
    before = ("multilora demo --keep --port 50051   # leaves the server running; then:", "")
    lines = (
        *(before if server is None else ()),
        f"grpcurl -plaintext -d '{request}' {target} multilora.v1.InferenceService/Classify",
        *(() if server is None else (f"curl {server.metrics_url}",)),
        "",
        "or in Python:",
        "",
        python,
    )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
