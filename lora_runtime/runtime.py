"""The runtime as a library: `Runtime(base).load(path)`, `.classify(adapter, texts)`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.engine import Engine, EngineSettings
from lora_runtime.errors import BaseModelUnsupported, InvalidRequest, TaskMismatch
from lora_runtime.kernels.grouped_lora.cpu import CpuGroupedLora
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.model.load import load_base
from lora_runtime.model.runner import PackedRunner
from lora_runtime.residency import Unloaded
from lora_runtime.types import (
    DEFAULT_TENANT,
    AdapterId,
    AdapterInfo,
    AdapterRef,
    AdapterState,
    Classification,
    Request,
    Task,
)


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """What one runtime may use."""

    arena_bytes: int = 512 << 20  # adapters in memory; pages are taken as adapters come
    token_budget: int = 2048  # tokens per step
    max_batch_sequences: int = 256
    num_loader_threads: int = 1
    num_threads: int | None = None  # torch's intra-op threads; None leaves torch's choice
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One text's answer."""

    label: str  # the best one; of a regression, its only one
    score: float
    scores: dict[str, float]  # in the adapter's label order


class Runtime:
    """One base, its engine and its tokenizer. Use it in a `with` block, or call `close`."""

    def __init__(self, base: str | Path, settings: RuntimeSettings | None = None) -> None:
        """Load the base; raises BaseModelUnsupported."""
        settings = settings or RuntimeSettings()
        if settings.dtype != "float32":
            raise BaseModelUnsupported(f"dtype {settings.dtype!r} is not served; float32 is", dtype=settings.dtype)
        # In a thread that ends: its team of OpenMP threads ends with it, so the engine's is the only one.
        with ThreadPoolExecutor(1, thread_name_prefix="multilora-base") as loading:
            model = loading.submit(load_base, base).result()
        arena = RankArena(settings.arena_bytes, torch.float32)
        slots = SlotTable(len(model.spec.sites), model.spec.groups)
        self.base_name = model.spec.name
        self.encoder = TextEncoder(model.tokenizer, model.spec.max_length)
        self.runner = PackedRunner(model, slots, CpuGroupedLora(arena, slots))
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
        known = next((info for info in self.engine.catalogue.all() if info.id == adapter), None)
        if known is None or known.state is not AdapterState.FAILED or known.path != folder:
            self.engine.register(adapter, folder).result()
        return self.engine.load(adapter).result()

    def unload(self, adapter: str) -> Unloaded:
        """Free an adapter's memory; it stays registered."""
        return self.engine.unload(self.engine.catalogue.resolve(AdapterRef.parse(adapter)).id).result()

    def classify(
        self, adapter: str, texts: Sequence[str | tuple[str, str]], *, truncate: bool = False
    ) -> list[Prediction]:
        """Classify texts, or (text, pair) tuples, with one adapter (`name` or `name@version`).

        Raises AdapterNotFound, AdapterFailed, TextTooLong, InvalidRequest for texts that are none.
        """
        pairs = _pairs(texts)
        if not pairs:
            return []
        info = self.engine.catalogue.resolve(AdapterRef.parse(adapter))
        if info.card is not None and info.card.task is not Task.CLASSIFY:
            raise TaskMismatch(str(info.id), Task.CLASSIFY, info.card.task)
        limit = info.card.max_length if info.card else None
        sequences = self.encoder.encode(pairs, max_length=limit, truncate=truncate)
        request = Request(f"local-{next(self._request_numbers)}", info.id, Task.CLASSIFY, sequences)
        result = self.engine.submit(request).result()
        assert result.card.labels is not None
        return [_prediction(output, result.card.labels) for output in result.outputs]

    def close(self, drain_seconds: float = 10.0) -> None:
        """Answer what was asked, then stop the threads. Further calls fail with EngineStopped."""
        self.engine.stop(drain_seconds)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _prediction(output: Classification, labels: tuple[str, ...]) -> Prediction:
    best = max(range(len(labels)), key=lambda i: output.scores[i])
    return Prediction(labels[best], output.scores[best], dict(zip(labels, output.scores, strict=True)))
