"""A real `multilora serve` that already has adapters, to which others are uploaded."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from server.demo.process import ServerProcess
from server.pb.multilora.v1 import inference_pb2, inference_pb2_grpc
from tests.recipes.commands import run_cli
from tests.recipes.rows import Row

CALL_S = 900.0
AT_ONCE = 128  # inputs of a request


class Live(ServerProcess):
    """`multilora serve` with a state folder, so that it takes uploads; `adapters` is served from the start."""

    def __init__(self, base: Path, adapters: Path, threads: int) -> None:
        super().__init__(str(base), adapters, threads, start_limit_s=300)
        self._command += ["--state", str(adapters.parent / "state")]
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        self._channel = grpc.insecure_channel(self.target, [("grpc.max_receive_message_length", 64 << 20)])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._channel is not None:
            self._channel.close()
        super().__exit__(kind, error, trace)

    @property
    def stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        assert self._channel is not None
        return inference_pb2_grpc.InferenceServiceStub(self._channel)

    def publish(self, name: str, folder: Path) -> str:
        """Upload an adapter with the control client and wait until it is READY; the command as a user types it."""
        run_cli(["adapters", "upload", name, str(folder), "--load", "--server", self.target])
        return f"multilora adapters upload {name} {folder.name} --load"

    def labels(self, adapter: str, rows: Sequence[Row]) -> list[str]:
        """The best label of each row."""
        replies = [
            self.stub.Classify(classify_request(adapter, part, top_k=1), timeout=CALL_S) for part in _parts(rows)
        ]
        return [result.scores[0].label for reply in replies for result in reply.results]

    def answers(self, adapter: str, rows: Sequence[Row]) -> list[str]:
        """The best span of each row's context."""
        replies = [self.stub.AnswerQuestion(answer_request(adapter, part), timeout=CALL_S) for part in _parts(rows)]
        return [result.answers[0].text for reply in replies for result in reply.results]

    def translations(self, adapter: str, rows: Sequence[Row], sampling: inference_pb2.SamplingParams) -> list[str]:
        replies = [
            self.stub.Translate(
                inference_pb2.TranslateRequest(
                    adapter=adapter, inputs=[inference_pb2.TextInput(text=row.text) for row in part], sampling=sampling
                ),
                timeout=CALL_S,
            )
            for part in _parts(rows)
        ]
        return [result.text for reply in replies for result in reply.results]

    def continuations(self, prompts: Sequence[str], sampling: inference_pb2.SamplingParams) -> list[str]:
        """Of the base alone."""
        replies = [
            self.stub.Generate(
                inference_pb2.GenerateRequest(
                    adapter="base",
                    inputs=[inference_pb2.PromptInput(text=prompt) for prompt in part],
                    sampling=sampling,
                ),
                timeout=CALL_S,
            )
            for part in _parts(prompts)
        ]
        return [result.samples[0].text for reply in replies for result in reply.results]

    def adapters_in_a_batch(self) -> int:
        """So many at least were in one of the batches so far: the histogram's bucket that holds the largest."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as page:
            lines = page.read().decode().splitlines()
        buckets = [line for line in lines if line.startswith("multilora_batch_adapters_bucket")]
        counts = [(line.split('le="')[1].split('"')[0], float(line.rpartition(" ")[2])) for line in buckets]
        total = max(count for _, count in counts)
        below = [float(bound) for bound, count in counts if count < total]
        return int(max(below, default=-1)) + 1


def classify_request(adapter: str, rows: Sequence[Row], **options: Any) -> inference_pb2.ClassifyRequest:
    inputs = [inference_pb2.TextInput(text=row.text) for row in rows]
    return inference_pb2.ClassifyRequest(adapter=adapter, inputs=inputs, truncate=True, **options)


def answer_request(adapter: str, rows: Sequence[Row], **options: Any) -> inference_pb2.AnswerQuestionRequest:
    inputs = [inference_pb2.QuestionInput(question=row.text, context=row.context) for row in rows]
    return inference_pb2.AnswerQuestionRequest(adapter=adapter, inputs=inputs, **options)


def generate_request(adapter: str, max_new_tokens: int, **prompt: Any) -> inference_pb2.GenerateRequest:
    """Greedy; `prompt` is a text, or the fields of the adapter's template. Tokens are returned."""
    sampling = inference_pb2.SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
    inputs = [inference_pb2.PromptInput(**prompt)]
    return inference_pb2.GenerateRequest(adapter=adapter, inputs=inputs, sampling=sampling, return_tokens=True)


def _parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE]
