"""A backend without a model: the engine's interface and promises, with answers that need no weights.

A folder's `adapter_config.json` holds `{"labels": [...], "max_length": N, "weights": "broken"}`; the last two
are optional. Tokens are words.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lora_runtime.errors import (
    AdapterAlreadyExists,
    AdapterFailed,
    AdapterNotFound,
    AdapterRejected,
    DeadlineExpired,
    MultiloraError,
    RequestCancelled,
    TextTooLong,
)
from lora_runtime.residency import Unloaded
from lora_runtime.types import (
    AdapterCard,
    AdapterId,
    AdapterInfo,
    AdapterRef,
    AdapterState,
    BatchStats,
    Classification,
    ProblemType,
    Request,
    Result,
    Task,
    Timings,
    TokenSequence,
)
from server.backend import EngineObserver

T = TypeVar("T")

DIGEST = "ab" * 32
RESIDENT_BYTES = 4096
MAX_LENGTH = 16


class FakeCatalogue:
    def __init__(self, adapters: dict[AdapterId, AdapterInfo]) -> None:
        self._adapters = adapters

    def resolve(self, ref: AdapterRef) -> AdapterInfo:
        versions = self.versions(ref.tenant, ref.name)
        version = ref.version if ref.version is not None else next(iter(versions), 0)
        if version not in versions:
            raise AdapterNotFound(str(ref))
        return self._adapters[AdapterId(ref.tenant, ref.name, version)]

    def list(self, tenant: str) -> Sequence[AdapterInfo]:
        return [self._adapters[key] for key in sorted(self._adapters) if key.tenant == tenant]

    def versions(self, tenant: str, name: str) -> Sequence[int]:
        return sorted(key.version for key in self._adapters if (key.tenant, key.name) == (tenant, name))


class FakeEngine:
    """One thread answers in order. Clear `gate` to hold requests back; set `answer` to replace answers."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.answer: Callable[[Request], Result] = self._classify
        self.cancelled: set[str] = set()
        self.seen: list[Request] = []
        self._adapters: dict[AdapterId, AdapterInfo] = {}
        self._observers: list[EngineObserver] = []
        self._requests: queue.Queue[tuple[Request, Future[Result]] | None] = queue.Queue()
        self.ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def catalogue(self) -> FakeCatalogue:
        return FakeCatalogue(dict(self._adapters))

    def add_observer(self, observer: EngineObserver) -> None:
        self._observers.append(observer)

    def submit(self, request: Request) -> Future[Result]:
        future: Future[Result] = Future()
        self._requests.put((request, future))
        return future

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    def register(self, adapter: AdapterId, path: Path, *, keep_failed: bool = False) -> Future[AdapterInfo]:
        return _attempt(lambda: self._register(adapter, path, keep_failed=keep_failed))

    def load(self, adapter: AdapterId) -> Future[AdapterInfo]:
        return _attempt(lambda: self._load(adapter))

    def unload(self, adapter: AdapterId) -> Future[Unloaded]:
        info = self._adapters[adapter]
        after = self._publish(replace(info, state=AdapterState.REGISTERED, resident_bytes=0))
        return _attempt(lambda: Unloaded(after, info.resident_bytes))

    def stop(self) -> None:
        self.gate.set()
        self._requests.put(None)
        self._thread.join()
        if not self.ended.done():
            self.ended.set_result(None)

    def _register(self, adapter: AdapterId, path: Path, *, keep_failed: bool) -> AdapterInfo:
        if adapter in self._adapters:
            raise AdapterAlreadyExists(str(adapter))
        info = AdapterInfo(adapter, path, AdapterState.REGISTERED, card=None)
        try:
            return self._publish(replace(info, card=_read_card(path)))
        except AdapterRejected as error:
            if not keep_failed:
                raise
            return self._publish(replace(info, state=AdapterState.FAILED, failure=error))

    def _load(self, adapter: AdapterId) -> AdapterInfo:
        info = self._adapters[adapter]
        if info.state is AdapterState.READY:
            return info
        if "broken" in (info.path / "adapter_config.json").read_text():
            error = AdapterRejected("NOT_FINITE", "adapter_model.safetensors", "tensor lora_A has a NaN")
            self._publish(replace(info, state=AdapterState.FAILED, failure=error))
            raise AdapterFailed(str(adapter), error)
        return self._publish(
            replace(
                info,
                state=AdapterState.READY,
                digest=DIGEST,
                resident_bytes=RESIDENT_BYTES,
                num_parameters=RESIDENT_BYTES // 4,
                ranks=(8,),
                load_seconds=0.02,
            )
        )

    def _publish(self, info: AdapterInfo) -> AdapterInfo:
        self._adapters[info.id] = info
        for observer in self._observers:
            observer.on_adapter(info)
        return info

    def _run(self) -> None:
        while (item := self._requests.get()) is not None:
            request, future = item
            self.gate.wait()
            outcome = self._outcome(request)
            if isinstance(outcome, Result):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
            if isinstance(outcome, Result | MultiloraError):
                for observer in self._observers:
                    observer.on_result(request, outcome)

    def _outcome(self, request: Request) -> Result | Exception:
        self.seen.append(request)
        if request.request_id in self.cancelled:
            return RequestCancelled("the caller went away")
        if request.deadline_monotonic is not None and request.deadline_monotonic < time.monotonic():
            return DeadlineExpired("the deadline passed in the queue")
        try:
            return self.answer(request)
        except Exception as error:  # noqa: BLE001 - tests inject anything
            return error

    def _classify(self, request: Request) -> Result:
        info = self._adapters[request.adapter]
        if info.failure is not None:
            raise AdapterFailed(str(info.id), info.failure)
        info = self._load(request.adapter)
        assert info.card is not None
        assert info.card.labels is not None
        num_labels = len(info.card.labels)
        outputs = tuple(fake_output(sequence, num_labels) for sequence in request.sequences)
        num_tokens = sum(sequence.num_tokens for sequence in request.sequences)
        for observer in self._observers:
            observer.on_batch(BatchStats(len(outputs), num_tokens, 1, 0.002))
        return Result(info.id, DIGEST, info.card, outputs, Timings(0.001, 0.0, 0.002))


class FakeEncoder:
    """A word is a token; an id is the sum of its characters. Two special tokens with id 0 surround a text."""

    def encode(
        self, inputs: Sequence[tuple[str, str | None]], *, max_length: int | None, truncate: bool
    ) -> tuple[TokenSequence, ...]:
        limit = min(max_length or MAX_LENGTH, MAX_LENGTH)
        return tuple(self._encode(index, item, limit, truncate) for index, item in enumerate(inputs))

    def _encode(self, index: int, item: tuple[str, str | None], limit: int, truncate: bool) -> TokenSequence:
        words = f"{item[0]} {item[1] or ''}".split()
        ids = (0, *(sum(map(ord, word)) for word in words), 0)
        if len(ids) <= limit:
            return TokenSequence(ids, None)
        if not truncate:
            raise TextTooLong(f"inputs[{index}].text", len(ids), limit)
        return TokenSequence(ids[:limit], None, truncated=True)


class FakeRuntime:
    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.encoder = FakeEncoder()
        self.base_name = "fake-base"
        self.closed = False

    def close(self, drain_seconds: float = 10.0) -> None:
        del drain_seconds  # nothing is ever in flight for long
        self.closed = True
        self.engine.stop()


def fake_output(sequence: TokenSequence, num_labels: int) -> Classification:
    """Logits that depend on text and label; all equal for an empty text."""
    total = sum(sequence.input_ids)
    logits = tuple((total * (index + 3) % 11) / 8 for index in range(num_labels))
    normaliser = sum(map(math.exp, logits))
    return Classification(logits, tuple(math.exp(logit) / normaliser for logit in logits))


def write_adapter(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _read_card(path: Path) -> AdapterCard:
    try:
        config = json.loads((path / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise AdapterRejected("JSON_INVALID", "adapter_config.json", "is not valid JSON") from error
    return AdapterCard(
        task=Task.CLASSIFY,
        labels=tuple(config["labels"]),
        problem_type=ProblemType.SINGLE_LABEL,
        max_length=config.get("max_length"),
        pad_token_id=0,
        base_model_name="fake-base",
        metrics={"accuracy": 0.9},
    )


def _attempt(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except MultiloraError as error:
        future.set_exception(error)
    return future
