"""A backend without a model: the engine's interface and promises, with answers that need no weights.

A folder's `adapter_config.json` holds the fields of an adapter card that a test cares about, all of them optional,
such as `{"task": "embed", "pooling": "cls"}`; `"weights": "broken"` makes its load fail. Answers are functions of the
token ids that a reader can compute: see `fake_output`.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.catalogue import Catalogue
from lora_runtime.decoding import GenerationStats
from lora_runtime.engine_stats import EngineStats
from lora_runtime.errors import (
    AdapterFailed,
    AdapterInUse,
    AdapterRejected,
    DeadlineExpired,
    InvalidRequest,
    MultiloraError,
    RequestCancelled,
    TaskMismatch,
)
from lora_runtime.observers import EngineObserver
from lora_runtime.prompts.spec import PromptSpec
from lora_runtime.prompts.template import PromptTemplate
from lora_runtime.shares import Shares
from lora_runtime.types import (
    BASE_NAME,
    DEFAULT_TENANT,
    AdapterCard,
    AdapterId,
    AdapterInfo,
    AdapterState,
    Alias,
    BatchStats,
    Classification,
    Embedding,
    Output,
    Pooling,
    ProblemType,
    Request,
    Result,
    RunnerStats,
    SpanLogits,
    Task,
    Timings,
    TokenClassification,
    TokenSequence,
    Unloaded,
)
from tests.service.fake_encoder import FakeEncoder
from tests.service.fake_generation import FakeDecoding, FakeTextGeneration

T = TypeVar("T")

DIGEST = "ab" * 32
RESIDENT_BYTES = 4096
BASE = AdapterInfo(
    AdapterId(DEFAULT_TENANT, BASE_NAME, 1),
    "fake-base",
    Path(),
    AdapterState.READY,
    AdapterCard(Task.EMBED, None, ProblemType.SINGLE_LABEL, None, None, None, pooling=Pooling.MEAN),
    digest="ba" * 32,
)


class FakeEngine:
    """One thread answers in order. Clear `gate` to hold requests back; set `answer` to replace answers.

    Requests that generate go on side by side, a token each a step; put a semaphore into `steps` to allow them singly.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.answer: Callable[[Request], Result] = self._answer
        self.steps: threading.Semaphore | None = None
        self.kv_stats: GenerationStats | None = None
        self.num_waiting = 0
        self.turned_at: float | None = None  # None: it turns
        self.fault: Callable[[Request], MultiloraError | None] = lambda _: (
            None
        )  # of a request that generates, at a step
        self.cancelled: set[str] = set()
        self.submitted: list[Request] = []
        self.seen: list[Request] = []  # those that a batch took
        self.prefetched: list[AdapterId] = []
        self.catalogue = Catalogue(BASE)
        self._observers: list[EngineObserver] = []
        self._requests: queue.Queue[tuple[Request, Future[Result]] | None] = queue.Queue()
        self._generating: dict[str, tuple[Request, Future[Result], FakeDecoding]] = {}
        self.ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add_observer(self, observer: EngineObserver) -> None:
        self._observers.append(observer)

    def use_shares(self, shares: Shares) -> None:
        self.shares = shares

    def stats(self) -> EngineStats:
        turned_at = time.monotonic() if self.turned_at is None else self.turned_at
        return EngineStats(turned_at, self.num_waiting, len(self._generating))

    def generation_stats(self) -> GenerationStats | None:
        return self.kv_stats

    def submit(self, request: Request) -> Future[Result]:
        future: Future[Result] = Future()
        self.submitted.append(request)
        self._requests.put((request, future))
        return future

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    def register(
        self, adapter: AdapterId, origin: Origin | Path, *, examine: bool = True, keep_failed: bool = False
    ) -> Future[AdapterInfo]:
        where = Origin(str(origin)) if isinstance(origin, Path) else origin
        return _attempt(lambda: self._register(adapter, where, keep_failed=keep_failed or not examine))

    def examine(self, adapter: AdapterId) -> Future[AdapterInfo]:
        return _attempt(lambda: self._examine(adapter))

    def prefetch(self, adapter: AdapterId) -> Future[AdapterInfo]:
        self.prefetched.append(adapter)
        return _attempt(lambda: self._prefetch(adapter))

    def load(self, adapter: AdapterId) -> Future[AdapterInfo]:
        return _attempt(lambda: self._load(adapter))

    def pin(self, adapter: AdapterId, *, pinned: bool = True) -> Future[AdapterInfo]:
        return _attempt(lambda: self._pin(adapter, pinned))

    def unload(self, adapter: AdapterId) -> Future[Unloaded]:
        return _attempt(lambda: self._unload(adapter))

    def delete(self, adapter: AdapterId, *, force: bool = False) -> Future[Unloaded]:
        return _attempt(lambda: self._delete(adapter, force))

    def set_alias(self, alias: Alias) -> Future[Alias]:
        return _attempt(lambda: self._set_alias(alias))

    def delete_alias(self, tenant: str, name: str, alias: str) -> Future[Alias]:
        return _attempt(lambda: self._delete_alias(tenant, name, alias))

    def stop(self) -> None:
        self.gate.set()
        self._requests.put(None)
        self._thread.join()
        if not self.ended.done():
            self.ended.set_result(None)

    def _register(self, adapter: AdapterId, origin: Origin, *, keep_failed: bool) -> AdapterInfo:
        if adapter.is_base:
            raise InvalidRequest("adapter", "the name is reserved for the base model")
        self.catalogue.check_free(adapter)
        path = origin.path
        info = AdapterInfo(adapter, origin.url, path, AdapterState.REGISTERED, card=None, revision=origin.revision)
        try:
            return self._publish(replace(info, card=None if path is None else _read_card(path)))
        except AdapterRejected as error:
            if not keep_failed:
                raise
            return self._publish(replace(info, state=AdapterState.FAILED, failure=error))

    def _examine(self, adapter: AdapterId) -> AdapterInfo:
        info = self.catalogue.get(adapter)
        assert info.path is not None
        return self._publish(replace(info, state=AdapterState.REGISTERED, failure=None, card=_read_card(info.path)))

    def _prefetch(self, adapter: AdapterId) -> AdapterInfo:
        info = self.catalogue.get(adapter)
        if info.failure is not None:
            raise AdapterFailed(str(adapter), info.failure)
        return info

    def _pin(self, adapter: AdapterId, pinned: bool) -> AdapterInfo:
        if adapter.is_base:
            raise InvalidRequest("adapter", "the base model needs no pin")
        info = self._load(adapter) if pinned else self.catalogue.get(adapter)
        return self._publish(replace(info, pinned=pinned))

    def _delete(self, adapter: AdapterId, force: bool) -> Unloaded:
        info = self.catalogue.get(adapter)
        if not force:
            self.catalogue.check_removable(adapter)
        for alias in self.catalogue.remove(adapter):
            self._tell("on_alias_deleted", alias)
        self._tell("on_deleted", adapter)
        return Unloaded(info, info.resident_bytes)

    def _set_alias(self, alias: Alias) -> Alias:
        self.catalogue.put_alias(alias)
        self._tell("on_alias", alias)
        return alias

    def _delete_alias(self, tenant: str, name: str, alias: str) -> Alias:
        gone = self.catalogue.alias(tenant, name, alias)
        self.catalogue.remove_alias(gone)
        self._tell("on_alias_deleted", gone)
        return gone

    def _unload(self, adapter: AdapterId) -> Unloaded:
        if adapter.is_base:
            raise InvalidRequest("adapter", "the base model cannot be unloaded")
        info = self.catalogue.get(adapter)
        if info.pinned:
            raise AdapterInUse(str(adapter), "is pinned; unpin it first")
        after = self._publish(replace(info, state=AdapterState.REGISTERED, resident_bytes=0))
        return Unloaded(after, info.resident_bytes)

    def _load(self, adapter: AdapterId) -> AdapterInfo:
        if adapter.is_base:
            return BASE
        info = self.catalogue.get(adapter)
        if info.state is AdapterState.READY:
            return info
        assert info.path is not None
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
        alias = self.catalogue.put(info)
        self._tell("on_adapter", info)
        if alias is not None:
            self._tell("on_alias", alias)
        return info

    def _tell(self, event: str, fact: object) -> None:
        for observer in self._observers:
            getattr(observer, event)(fact)

    @property
    def num_generating(self) -> int:
        return len(self._generating)

    def _run(self) -> None:
        while True:
            try:
                item = self._requests.get(block=not self._generating)
            except queue.Empty:
                self._step()
                continue
            if item is None:
                return
            request, future = item
            self.gate.wait()
            outcome = self._outcome(request)
            if outcome is None:
                self._generating[request.request_id] = request, future, FakeDecoding(request)
            else:
                self._settle(request, future, outcome)

    def _step(self) -> None:
        """A token of every sample; before it, requests that were cancelled or are late are answered."""
        for request, future, _ in [*self._generating.values()]:
            if (error := self._dropped(request) or self.fault(request)) is not None:
                self._end(request, future, error)
        if self.steps is not None and not self.steps.acquire(timeout=0.005):
            return
        for request, future, decoding in [*self._generating.values()]:
            try:
                outputs = decoding.step()
            except Exception as error:  # noqa: BLE001 - a fault of the fake's, which its test is to see
                self._end(request, future, error)
                continue
            if outputs is not None:
                info = self.catalogue.get(request.adapter)
                assert info.card is not None
                timings = Timings(0.001, 0.0, 0.002)
                self._end(request, future, Result(info.id, info.digest or DIGEST, info.card, outputs, timings))

    def _end(self, request: Request, future: Future[Result], outcome: Result | Exception) -> None:
        del self._generating[request.request_id]
        self._settle(request, future, outcome)

    def _settle(self, request: Request, future: Future[Result], outcome: Result | Exception) -> None:
        if isinstance(outcome, Result):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
        if isinstance(outcome, Result | MultiloraError):
            for observer in self._observers:
                observer.on_result(request, outcome)

    def _dropped(self, request: Request) -> MultiloraError | None:
        if request.request_id in self.cancelled:
            return RequestCancelled("the caller went away")
        if request.deadline_monotonic is not None and request.deadline_monotonic < time.monotonic():
            return DeadlineExpired("the deadline passed in the queue")
        return None

    def _outcome(self, request: Request) -> Result | Exception | None:
        """None: it generates from now on."""
        self.seen.append(request)
        if (dropped := self._dropped(request)) is not None:
            return dropped
        try:
            if request.generation is not None and self.answer == self._answer:
                self._ready(request)
                return None
            return self.answer(request)
        except Exception as error:  # noqa: BLE001 - tests inject anything
            return error

    def _ready(self, request: Request) -> AdapterInfo:
        known = self.catalogue.get(request.adapter)
        if known.failure is not None:
            raise AdapterFailed(str(known.id), known.failure)
        info = self._load(request.adapter)
        if info.card is not None and info.card.task is not request.task:
            raise TaskMismatch(str(info.id), request.task, info.card.task)
        return info

    def _answer(self, request: Request) -> Result:
        info = self._ready(request)
        card = info.card
        assert card is not None
        assert info.digest is not None
        outputs = _generated(request) or tuple(fake_output(request, sequence, card) for sequence in request.sequences)
        num_tokens = sum(sequence.num_tokens for sequence in request.sequences)
        for observer in self._observers:
            observer.on_batch(BatchStats(len(outputs), num_tokens, int(not info.id.is_base), 0.002))
        return Result(info.id, info.digest, card, outputs, Timings(0.001, 0.0, 0.002))


class FakeRuntime:
    """Clear `tokenizer_gate` to hold tokenising back."""

    def __init__(self) -> None:
        self.tokenizer_gate = threading.Event()
        self.tokenizer_gate.set()
        self.engine = FakeEngine()
        self.base_name = "fake-base"
        self.closed = False
        self.runner_stats = RunnerStats()
        self.warmed_up_with: set[str] | None = None  # adapters that were READY then
        self.encoder_threads: set[str] = set()  # names of those that asked for an encoder

    def encoder_for(self, info: AdapterInfo) -> FakeEncoder:
        self.encoder_threads.add(threading.current_thread().name)
        self.tokenizer_gate.wait()
        return FakeEncoder(by_character=info.card is not None and info.card.tokenizer_sha256 is not None)

    def generation_for(self, info: AdapterInfo) -> FakeTextGeneration:
        self.encoder_for(info)
        return FakeTextGeneration()

    def warm_up(self) -> None:
        self.warmed_up_with = {str(info.id) for info in self.engine.catalogue.all() if info.state is AdapterState.READY}

    def stats(self) -> RunnerStats:
        return self.runner_stats

    def close(self, drain_seconds: float = 10.0) -> None:
        del drain_seconds  # nothing is ever in flight for long
        self.closed = True
        self.engine.stop()


def _generated(request: Request) -> tuple[Output, ...]:
    """All at once; nothing for other tasks."""
    if request.generation is None:
        return ()
    decoding = FakeDecoding(request)
    while (outputs := decoding.step()) is None:
        pass
    return outputs


def fake_output(request: Request, sequence: TokenSequence, card: AdapterCard) -> Output:
    """A function of the token ids and of what was asked.

    CLASSIFY: logits that depend on text and label; all equal for an empty text. CLASSIFY_TOKENS: label `id % labels`,
    by 4 logits. ANSWER: start and end logits are `id % 10 - 2`, 0 for special tokens. EMBED: (tokens, sum of ids % 11,
    which pooling). GENERATE is in `fake_generation`.
    """
    ids = sequence.input_ids
    match request.task:
        case Task.CLASSIFY:
            return _classification(sum(ids), len(card.labels or ()))
        case Task.CLASSIFY_TOKENS:
            num_labels = len(card.labels or ())
            return TokenClassification(
                tuple(tuple(4.0 * (i == x % num_labels) for i in range(num_labels)) for x in ids)
            )
        case Task.ANSWER:
            logits = tuple(float(x % 10 - 2) if x else 0.0 for x in ids)
            return SpanLogits(logits, logits)
        case Task.EMBED:
            pooling = request.pooling or card.pooling
            return Embedding((float(len(ids)), float(sum(ids) % 11), float([*Pooling].index(Pooling(pooling)))))
        case Task.GENERATE:
            raise NotImplementedError


def _classification(total: int, num_labels: int) -> Classification:
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
        task=Task(config.get("task", "classify")),
        labels=tuple(config["labels"]) if "labels" in config else None,
        problem_type=ProblemType.SINGLE_LABEL,
        max_length=config.get("max_length"),
        pad_token_id=0,
        base_model_name="fake-base",
        metrics={"accuracy": 0.9},
        pooling=Pooling(config.get("pooling", "mean")) if config.get("task") == Task.EMBED else None,
        normalize=config.get("normalize", False),
        tokenizer_sha256=config.get("tokenizer_sha256"),
        prompt=_prompt(config["prompt"]) if "prompt" in config else None,
    )


def _prompt(config: dict[str, Any]) -> PromptSpec:
    template = PromptTemplate.parse(config["template"]) if "template" in config else None
    return PromptSpec(template, config.get("chat", False), config.get("system"), config.get("defaults", {}))


def _attempt(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except MultiloraError as error:
        future.set_exception(error)
    return future
