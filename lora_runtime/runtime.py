"""The runtime as a library: `Runtime(base).load(path)`, `.classify(adapter, texts)`."""

from __future__ import annotations

import itertools
import logging
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType

from lora_runtime.adapters.loader import Fetching
from lora_runtime.answers.spans import Span, best_spans, supports_no_answer
from lora_runtime.answers.token_classes import SubwordStrategy, TokenLabel, TokenUnit, label_tokens
from lora_runtime.answers.vectors import unit_length
from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.engine import Engine
from lora_runtime.engine_settings import EngineSettings
from lora_runtime.errors import InvalidRequest
from lora_runtime.generation import Delta, Generated, Sample
from lora_runtime.kernels.grouped_lora import GroupedLora
from lora_runtime.kernels.grouped_lora.registry import BackendResources, backend_for_base
from lora_runtime.kernels.grouped_lora.triton_backend.capturable import CapturableLora
from lora_runtime.kv_blocks import KvBlocks
from lora_runtime.model.base import BaseModel, PackedBackbone
from lora_runtime.model.buckets import GraphSettings
from lora_runtime.model.capture import CudaCapture
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.model.encoders import Encoders
from lora_runtime.model.graphs import GraphedBackbone
from lora_runtime.model.kv_room import kv_blocks_of, kv_cache_for
from lora_runtime.model.load import load_base
from lora_runtime.model.paged import PagedLayers
from lora_runtime.model.placement import Placement, resolve_placement
from lora_runtime.model.runner import PackedRunner
from lora_runtime.model.text_generation import DecoderFacts, TextGeneration, decoder_facts
from lora_runtime.predictions import Prediction, labels_of, prediction_of, single_texts, text_pairs
from lora_runtime.prompting import Asked, Prompt
from lora_runtime.sampling.constrained import ConstraintKind
from lora_runtime.sampling.params import SamplingParams
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

MAX_GENERATING = 128  # sequences at once
_STACKS_SHARE = 16  # of the arena's bytes, one part is for what the kernels copy to be fast


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """What one runtime may use."""

    arena_bytes: int = 512 << 20  # adapters in memory, and the kernels' copies of them; pages are taken as they come
    token_budget: int = 256  # tokens per step
    beside_tokens: int = 48  # most in a step beside texts under way: more of them make their readers wait longer
    max_batch_sequences: int = 256
    num_loader_threads: int = 1
    num_threads: int | None = None  # torch's intra-op threads; None leaves torch's choice
    device: str = "cpu"  # cpu, cuda or cuda:N
    dtype: str = "float32"  # of the base, its adapters and activations: float32, bfloat16 or float16
    graph_bytes: int = 1 << 30  # device memory that captured forward passes may take; 0 has every step run eagerly
    host_bytes: int = 1 << 30  # page-locked memory for adapters beside those on an accelerator; none is used on the CPU
    backend: str | None = None  # of the low-rank deltas, by its name in the registry; None: the device's default
    prepack: bool = True  # keep reordered copies of the base's projections: faster, and as much memory again
    kv_bytes: int = 1 << 30  # keys and values of sequences that generate; on the CPU, pages are taken as they come
    kv_block_tokens: int | None = None  # of one block of them; None: what attention on the device reads fastest
    run_ahead: bool | None = None  # launch a step while the one before computes; None: on an accelerator
    prefix_cache: bool = True  # keep those of prompts for others of the same tenant and adapter that begin alike
    gguf_file: str | None = None  # the name of a GGUF file in the base's folder or repository; its weights become fp32
    quantize: str = "none"  # the base's projections: a `Quantization`; has them not prepacked


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
        lora = backend.make(resources)
        kv = kv_cache_for(model, settings.kv_bytes, settings.kv_block_tokens, MAX_GENERATING)
        blocks = None if kv is None else kv_blocks_of(kv, model)
        self.encoders = Encoders(TextEncoder(model.tokenizer, model.spec.max_length), _decoder(model, blocks))
        paged = None if kv is None else PagedLayers(kv)
        self.runner = PackedRunner(_with_graphs(model, slots, lora, settings, paged), slots, lora, paged)
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
                MAX_GENERATING,
                settings.beside_tokens,
                settings.prefix_cache,
                placement.device.type != "cpu" if settings.run_ahead is None else settings.run_ahead,
            ),
            host=_host_tier(settings, placement),
            fetcher=fetcher,
            blocks=blocks,
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
        pairs = text_pairs(texts)
        info, encoder, limit = self._resolve(adapter, Task.CLASSIFY)
        sequences = encoder.encode(pairs, max_length=limit, truncate=truncate)
        result = self._ask(info, Task.CLASSIFY, sequences)
        return [prediction_of(o, labels_of(result)) for o in result.outputs if isinstance(o, Classification)]

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
        encoded = encoder.encode_tokens(single_texts(texts), max_length=limit, truncate=truncate)
        result = self._ask(info, Task.CLASSIFY_TOKENS, tuple(text.sequence for text in encoded))
        return [
            label_tokens(text, output, labels_of(result), unit=unit, strategy=strategy)
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
        pairs = text_pairs(texts)
        info, encoder, limit = self._resolve(adapter, Task.EMBED)
        sequences = encoder.encode(pairs, max_length=limit, truncate=truncate)
        result = self._ask(info, Task.EMBED, sequences, pooling=pooling)
        vectors = [output.values for output in result.outputs if isinstance(output, Embedding)]
        chosen = result.card.normalize if normalize is None else normalize
        return [unit_length(vector) for vector in vectors] if chosen else vectors

    def generation_for(self, info: AdapterInfo) -> TextGeneration:
        """What generation with an adapter needs of its tokenizer; it may be read from the adapter's folder."""
        return self.encoders.generation_for(info)

    def generate(
        self,
        adapter: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        constraint: tuple[ConstraintKind, str] | None = None,
    ) -> list[tuple[Sample, ...]]:
        """Continue each prompt, with `sampling.n` samples each; `base` is the base alone.

        A prompt is a text, a conversation, or the values of the fields of the adapter's prompt template. `sampling`
        None: the adapter's own defaults. Raises as `classify`.
        """
        if not prompts:
            return []
        _, future = self._submit(adapter, Asked(prompts, sampling, constraint))
        return [output.samples for output in future.result().outputs if isinstance(output, Generated)]

    def stream(
        self,
        adapter: str,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        constraint: tuple[ConstraintKind, str] | None = None,
    ) -> Iterator[Delta]:
        """As `generate`, piece by piece as the text comes. One that is closed early cancels its request."""
        pieces: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        name, future = self._submit(adapter, Asked([prompt], sampling, constraint, pieces.put))
        future.add_done_callback(lambda _: pieces.put(None))
        return self._pieces(pieces, name, future)

    def _pieces(self, pieces: queue.SimpleQueue[Delta | None], name: str, future: Future[Result]) -> Iterator[Delta]:
        try:
            while (delta := pieces.get()) is not None:
                yield delta
            future.result()
        finally:
            self.engine.cancel(name)

    def _submit(self, adapter: str, asked: Asked) -> tuple[str, Future[Result]]:
        info, _, _ = self._resolve(adapter, Task.GENERATE)
        name = f"local-{next(self._request_numbers)}"
        return name, self.engine.submit(asked.request(name, info, self.generation_for(info)))

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
        self.encoders.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decoder(model: BaseModel, blocks: KvBlocks | None) -> DecoderFacts | None:
    """What generation needs to know of the base; None where it generates nothing."""
    if blocks is None:
        return None
    facts = decoder_facts(model.config, model.generation_config, model.tokenizer)
    return replace(facts, max_length=min(facts.max_length, blocks.max_length))


def _with_graphs(
    model: BaseModel, slots: SlotTable, lora: GroupedLora, settings: RuntimeSettings, paged: PagedLayers | None
) -> BaseModel:
    """The base with its forward captured, on CUDA and where base and backend allow it; else as it is."""
    device = model.placement.device
    if device.type != "cuda" or not settings.graph_bytes:
        return model
    if not isinstance(model.backbone, PackedBackbone) or not isinstance(lora, CapturableLora):
        what = "it runs padded" if isinstance(lora, CapturableLora) else "the backend cannot be captured"
        logger.warning("base %s: every step runs eagerly, without graphs: %s", model.spec.name, what)
        return model
    graphs = GraphSettings.usual(
        settings.graph_bytes, settings.token_budget, settings.max_batch_sequences, model.spec.max_length, MAX_GENERATING
    )
    capture = CudaCapture(device)
    return replace(model, backbone=GraphedBackbone(model.backbone, lora, slots, capture, graphs, paged))


def _host_tier(settings: RuntimeSettings, placement: Placement) -> RankArena | None:
    """Where images are written before they go to an accelerator; None where the arena itself is host memory."""
    if placement.device.type == "cpu":
        return None
    return RankArena(settings.host_bytes, placement.dtype, pin_memory=True)
