"""The runtime as a library: `Runtime(base).load(path)`, `.classify(adapter, texts)`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType

from lora_runtime.adapters.loader import Fetching
from lora_runtime.answers.spans import Span, best_spans, supports_no_answer
from lora_runtime.answers.token_classes import SubwordStrategy, TokenLabel, TokenUnit, label_tokens
from lora_runtime.answers.vectors import unit_length
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.engine import Engine, EngineSettings
from lora_runtime.errors import InvalidRequest
from lora_runtime.kernels.grouped_lora import GroupedLora
from lora_runtime.kernels.grouped_lora.registry import BackendResources, backend_for_base
from lora_runtime.kernels.grouped_lora.triton_backend.capturable import CapturableLora
from lora_runtime.model.base import BaseModel, PackedBackbone
from lora_runtime.model.capture import CudaCapture
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.model.encoders import Encoders
from lora_runtime.model.graphs import GraphedBackbone, GraphSettings
from lora_runtime.model.load import load_base
from lora_runtime.model.placement import Placement, resolve_placement
from lora_runtime.model.runner import PackedRunner
from lora_runtime.types import (
    DEFAULT_TENANT,
    AdapterId,
    AdapterInfo,
    AdapterRef,
    AdapterState,
    Classification,
    Embedding,
    Pooling,
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

logger = logging.getLogger(__name__)

_STACKS_SHARE = 16  # of the arena's bytes, one part is for what the kernels copy to be fast


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """What one runtime may use."""

    arena_bytes: int = 512 << 20  # adapters in memory, and the kernels' copies of them; pages are taken as they come
    token_budget: int = 256  # tokens per step
    max_batch_sequences: int = 256
    num_loader_threads: int = 1
    num_threads: int | None = None  # torch's intra-op threads; None leaves torch's choice
    device: str = "cpu"  # cpu, cuda or cuda:N
    dtype: str = "float32"  # of the base, its adapters and activations: float32, bfloat16 or float16
    graph_bytes: int = 1 << 30  # device memory that captured forward passes may take; 0 has every step run eagerly
    host_bytes: int = 1 << 30  # page-locked memory for adapters beside those on an accelerator; none is used on the CPU
    backend: str | None = None  # of the low-rank deltas, by its name in the registry; None: the device's default
    prepack: bool = True  # keep reordered copies of the base's projections: faster, and as much memory again
    gguf_file: str | None = None  # the name of a GGUF file in the base's folder or repository; its weights become fp32
    quantize: str = "none"  # the base's projections: a `Quantization`; has them not prepacked


@dataclass(frozen=True, slots=True)
class Prediction:
    """One text's answer."""

    label: str  # the best one; of a regression, its only one
    score: float
    scores: dict[str, float]  # in the adapter's label order


class Runtime:
    """One base, its engine and its tokenizer. Use it in a `with` block, or call `close`."""

    def __init__(
        self, base: str | Path, settings: RuntimeSettings | None = None, fetcher: Fetching | None = None
    ) -> None:
        """Load the base; raises BaseModelUnsupported. Without a `fetcher` adapters come from local folders alone."""
        settings = settings or RuntimeSettings()
        placement = resolve_placement(settings.device, settings.dtype)
        backend = backend_for_base(placement.device, placement.dtype, settings.backend)
        # In a thread that ends: its team of OpenMP threads ends with it, so the engine's is the only one.
        with ThreadPoolExecutor(1, thread_name_prefix="multilora-base") as loading:
            model = loading.submit(
                load_base,
                base,
                prepack=settings.prepack,
                quantize=settings.quantize,
                device=settings.device,
                dtype=settings.dtype,
                gguf_file=settings.gguf_file,
            ).result()
        logger.info("base %s: low-rank deltas by the %s backend", model.spec.name, backend.name)
        stack_bytes = settings.arena_bytes // _STACKS_SHARE if backend.makes_stacks else 0
        arena = RankArena(settings.arena_bytes - stack_bytes, placement.dtype, placement.device)
        slots = SlotTable(len(model.spec.sites), model.spec.groups, a_layout=backend.a_layout)
        resources = BackendResources(arena, slots, placement.dtype, stack_bytes)
        self.base_name = model.spec.name
        self.encoders = Encoders(TextEncoder(model.tokenizer, model.spec.max_length))
        lora = backend.make(resources)
        self.runner = PackedRunner(_with_graphs(model, slots, lora, settings), slots, lora)
        self.engine = Engine(
            model.spec,
            self.runner,
            arena,
            slots,
            EngineSettings(
                settings.token_budget,
                settings.max_batch_sequences,
                settings.num_loader_threads,
                settings.num_threads,
            ),
            host=_host_tier(settings, placement),
            fetcher=fetcher,
        )
        self.engine.start()
        self._request_numbers = itertools.count(1)

    def load(self, path: str | Path, *, name: str | None = None, version: int = 1) -> AdapterInfo:
        """Register a PEFT folder under its own name, or `name`, and load it.

        A folder whose load was refused can be mended and loaded again. Raises AdapterRejected or AdapterFailed with
        the reason, AdapterAlreadyExists, InvalidRequest for the name.
        """
        folder = Path(path)
        adapter = AdapterId(DEFAULT_TENANT, name or folder.resolve().name, version)
        known = self.engine.catalogue.find(adapter)
        if known is None or known.state is not AdapterState.FAILED or known.path != folder:
            self.engine.register(adapter, folder).result()
        return self.engine.load(adapter).result()

    def warm_up(self) -> None:
        """Compile the kernels and capture the graphs that steps will need, for the adapters that are READY by now.

        It takes seconds, in which nobody is answered. What is loaded later takes the graphs that suit it.
        """
        self.engine.call(self.runner.warm_up)

    def stats(self) -> RunnerStats:
        """What the runner did so far."""
        return self.runner.stats()

    def unload(self, adapter: str) -> Unloaded:
        """Free an adapter's memory; it stays registered."""
        return self.engine.unload(self.engine.catalogue.resolve(AdapterRef.parse(adapter)).id).result()

    @property
    def encoder(self) -> TextEncoder:
        """The base's tokenizer."""
        return self.encoders.base

    def encoder_for(self, info: AdapterInfo) -> TextEncoder:
        """The tokenizer of an adapter's texts; it may be read from the adapter's folder."""
        return self.encoders.for_adapter(info)

    def classify(
        self, adapter: str, texts: Sequence[str | tuple[str, str]], *, truncate: bool = False
    ) -> list[Prediction]:
        """Classify texts, or (text, pair) tuples, with one adapter (`name` or `name@version`).

        Raises AdapterNotFound, AdapterFailed, TaskMismatch, TextTooLong, InvalidRequest for texts that are none.
        """
        pairs = _pairs(texts)
        info, encoder, limit = self._resolve(adapter, Task.CLASSIFY)
        sequences = encoder.encode(pairs, max_length=limit, truncate=truncate)
        result = self._ask(info, Task.CLASSIFY, sequences)
        return [_prediction(o, _labels(result)) for o in result.outputs if isinstance(o, Classification)]

    def classify_tokens(
        self,
        adapter: str,
        texts: Sequence[str],
        *,
        unit: TokenUnit = TokenUnit.WORDS,
        strategy: SubwordStrategy = SubwordStrategy.FIRST,
        truncate: bool = False,
    ) -> list[tuple[TokenLabel, ...]]:
        """Label the tokens, words or entities of texts; offsets are code points of each text. Raises as `classify`."""
        info, encoder, limit = self._resolve(adapter, Task.CLASSIFY_TOKENS)
        encoded = encoder.encode_tokens(_texts(texts), max_length=limit, truncate=truncate)
        result = self._ask(info, Task.CLASSIFY_TOKENS, tuple(text.sequence for text in encoded))
        return [
            label_tokens(text, output, _labels(result), unit=unit, strategy=strategy)
            for text, output in zip(encoded, result.outputs, strict=True)
            if isinstance(output, TokenClassification)
        ]

    def answer(
        self,
        adapter: str,
        questions: Sequence[tuple[str, str]],
        *,
        top_k: int = 1,
        max_answer_tokens: int = 30,
        allow_no_answer: bool = False,
    ) -> list[tuple[Span, ...]]:
        """The best spans of each (question, context), best first; `context[span.start : span.end]` is the answer.

        A context longer than the model is read in overlapping windows. Raises as `classify`.
        """
        info, encoder, limit = self._resolve(adapter, Task.ANSWER)
        inputs = encoder.encode_questions(questions, max_length=limit)
        sequences = tuple(window.sequence for windows in inputs for window in windows)
        input_of = tuple(i for i, windows in enumerate(inputs) for _ in windows)
        if allow_no_answer and not all(map(supports_no_answer, inputs)):
            raise InvalidRequest("allow_no_answer", "the tokenizer has no CLS token, at which no answer is scored")
        spans = iter(self._ask(info, Task.ANSWER, sequences, input_of=input_of).outputs)
        answers: list[tuple[Span, ...]] = []
        for windows in inputs:
            logits = [output for output in islice(spans, len(windows)) if isinstance(output, SpanLogits)]
            answers.append(
                best_spans(
                    windows,
                    logits,
                    top_k=top_k,
                    max_answer_tokens=max_answer_tokens,
                    allow_no_answer=allow_no_answer,
                )
            )
        return answers

    def embed(
        self,
        adapter: str,
        texts: Sequence[str | tuple[str, str]],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
    ) -> list[tuple[float, ...]]:
        """One vector a text, by an embedding adapter or by `base`; None: as the adapter says. Raises as `classify`."""
        pairs = _pairs(texts)
        info, encoder, limit = self._resolve(adapter, Task.EMBED)
        sequences = encoder.encode(pairs, max_length=limit, truncate=truncate)
        result = self._ask(info, Task.EMBED, sequences, pooling=pooling)
        vectors = [output.values for output in result.outputs if isinstance(output, Embedding)]
        chosen = result.card.normalize if normalize is None else normalize
        return [unit_length(vector) for vector in vectors] if chosen else vectors

    def _resolve(self, adapter: str, task: Task) -> tuple[AdapterInfo, TextEncoder, int | None]:
        """The adapter, its encoder, and its own limit of tokens."""
        info = self.engine.catalogue.resolve(AdapterRef.parse(adapter))
        if not info.is_read:
            info = self.engine.prefetch(info.id).result()
        card = info.card_for(task)
        return info, self.encoder_for(info), card.max_length

    def _ask(
        self,
        info: AdapterInfo,
        task: Task,
        sequences: tuple[TokenSequence, ...],
        *,
        pooling: Pooling | None = None,
        input_of: tuple[int, ...] | None = None,
    ) -> Result:
        if not sequences:
            assert info.card is not None
            return Result(info.id, info.digest or "", info.card, (), Timings(0.0, 0.0, 0.0))
        name = f"local-{next(self._request_numbers)}"
        request = Request(name, info.id, task, sequences, pooling=pooling, input_of=input_of)
        return self.engine.submit(request).result()

    def close(self, drain_seconds: float = 10.0) -> None:
        """Answer what was asked, then stop the threads. Further calls fail with EngineStopped."""
        self.engine.stop(drain_seconds)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_graphs(model: BaseModel, slots: SlotTable, lora: GroupedLora, settings: RuntimeSettings) -> BaseModel:
    """The base with its forward captured, on CUDA and where base and backend allow it; else as it is."""
    device = model.placement.device
    if device.type != "cuda" or not settings.graph_bytes:
        return model
    if not isinstance(model.backbone, PackedBackbone) or not isinstance(lora, CapturableLora):
        what = "it runs padded" if isinstance(lora, CapturableLora) else "the backend cannot be captured"
        logger.warning("base %s: every step runs eagerly, without graphs: %s", model.spec.name, what)
        return model
    graphs = GraphSettings.usual(
        settings.graph_bytes, settings.token_budget, settings.max_batch_sequences, model.spec.max_length
    )
    return replace(model, backbone=GraphedBackbone(model.backbone, lora, slots, CudaCapture(device), graphs))


def _host_tier(settings: RuntimeSettings, placement: Placement) -> RankArena | None:
    """Where images are written before they go to an accelerator; None where the arena itself is host memory."""
    if placement.device.type == "cpu":
        return None
    return RankArena(settings.host_bytes, placement.dtype, pin_memory=True)


def _pairs(texts: Sequence[object]) -> list[tuple[str, str | None]]:
    if isinstance(texts, str):
        raise InvalidRequest("texts", "is one string; pass a list of texts")
    pairs: list[tuple[str, str | None]] = []
    for i, item in enumerate(texts):
        match item:
            case str():
                pairs.append((item, None))
            case (str() as text, str() as pair):
                pairs.append((text, pair))
            case _:
                raise InvalidRequest(f"texts[{i}]", f"is a {type(item).__name__}; a text or a (text, pair) is needed")
    return pairs


def _texts(texts: Sequence[object]) -> list[str]:
    pairs = _pairs(texts)
    for i, (_, pair) in enumerate(pairs):
        if pair is not None:
            raise InvalidRequest(f"texts[{i}]", "is a pair; one text is needed")
    return [text for text, _ in pairs]


def _labels(result: Result) -> tuple[str, ...]:
    assert result.card.labels is not None, "loaded weights have labels"
    return result.card.labels


def _prediction(output: Classification, labels: tuple[str, ...]) -> Prediction:
    best = max(range(len(labels)), key=lambda i: output.scores[i])
    return Prediction(labels[best], output.scores[best], dict(zip(labels, output.scores, strict=True)))
