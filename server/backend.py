"""What the server needs of a runtime, as protocols, and the slot in which RPCs find it.

`lora_runtime.runtime.Runtime` is the implementation. It is imported only when a base is loaded, so that the
command line answers at once; tests put a fake in its place.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.catalogue import Catalogue
from lora_runtime.errors import EngineStopped, MultiloraError
from lora_runtime.generation import TextStream
from lora_runtime.observers import EngineObserver
from lora_runtime.prompts.chat import Chat
from lora_runtime.shares import Shares
from lora_runtime.types import AdapterId, AdapterInfo, Alias, Request, Result, RunnerStats, TokenSequence, Unloaded

if TYPE_CHECKING:  # brings torch, transformers and tokenizers
    from lora_runtime.decoding import GenerationStats
    from lora_runtime.engine_stats import EngineStats
    from lora_runtime.model.encoder_text import TokenText, Window
    from lora_runtime.sampling.constrained import ConstraintKind
    from lora_runtime.sampling.row import LogitsMask

T = TypeVar("T")


class Engine(Protocol):
    """The engine's thread as callers see it: nothing here blocks, and failures arrive in the futures."""

    def submit(self, request: Request) -> Future[Result]: ...

    def cancel(self, request_id: str) -> None: ...

    def register(
        self, adapter: AdapterId, origin: Origin | Path, *, examine: bool = True, keep_failed: bool = False
    ) -> Future[AdapterInfo]: ...

    def examine(self, adapter: AdapterId) -> Future[AdapterInfo]: ...

    def prefetch(self, adapter: AdapterId) -> Future[AdapterInfo]: ...

    def load(self, adapter: AdapterId) -> Future[AdapterInfo]: ...

    def pin(self, adapter: AdapterId, *, pinned: bool = True) -> Future[AdapterInfo]: ...

    def unload(self, adapter: AdapterId) -> Future[Unloaded]: ...

    def delete(self, adapter: AdapterId, *, force: bool = False) -> Future[Unloaded]: ...

    def set_alias(self, alias: Alias) -> Future[Alias]: ...

    def delete_alias(self, tenant: str, name: str, alias: str) -> Future[Alias]: ...

    def use_shares(self, shares: Shares) -> None: ...

    def add_observer(self, observer: EngineObserver) -> None: ...

    def stats(self) -> EngineStats:
        """What waits and runs now, and when the loop last turned; from any thread, at once."""
        ...

    def generation_stats(self) -> GenerationStats | None:
        """What the KV cache holds and did; None where nothing generates. From any thread."""
        ...

    @property
    def catalogue(self) -> Catalogue:
        """Safe to read from any thread."""
        ...

    @property
    def ended(self) -> Future[None]:
        """Done when the thread ends, with an error when it failed."""
        ...


class Fetching(Protocol):
    """Where the files of URLs come from: `lora_runtime.adapters.sources.fetch.Fetcher`."""

    def resolve(self, url: str, stop: threading.Event) -> Origin: ...

    def cached_bytes(self, origin: Origin) -> int: ...

    def evict(self, origin: Origin) -> int: ...


class TextEncoder(Protocol):
    """A tokenizer; thread-safe. `max_length` is in tokens, special ones included; None: what the base allows.

    A wrong text is an InvalidRequest (TextTooLong) on its field, such as `inputs[3].text`.
    """

    def encode(
        self, inputs: Sequence[tuple[str, str | None]], *, max_length: int | None, truncate: bool
    ) -> tuple[TokenSequence, ...]: ...

    def encode_tokens(
        self, texts: Sequence[str], *, max_length: int | None, truncate: bool
    ) -> tuple[TokenText, ...]: ...

    def encode_questions(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        max_length: int | None,
        doc_stride: int | None = None,
        max_windows: int = 64,
    ) -> tuple[tuple[Window, ...], ...]: ...


class TextGeneration(Protocol):
    """What generation needs of a tokenizer; thread-safe: `lora_runtime.model.text_generation.TextGeneration`."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    def encode_prompts(self, prompts: Sequence[str | Chat], *, max_length: int | None) -> tuple[TokenSequence, ...]:
        """Raises InvalidRequest (TextTooLong) on `inputs[i].text`, or `inputs[i].messages` of a conversation."""
        ...

    def room(self, sequence: TokenSequence, max_length: int | None = None) -> int:
        """Tokens that may follow before the context is full."""
        ...

    def new_text(self) -> TextStream: ...

    def compile(self, kind: ConstraintKind, text: str) -> Callable[[], LogitsMask]:
        """Raises InvalidRequest on `constraint.json_schema` or `constraint.regex`."""
        ...


class Backend(Protocol):
    """A base in memory with its engine running."""

    @property
    def engine(self) -> Engine: ...

    def encoder_for(self, info: AdapterInfo) -> TextEncoder:
        """The tokenizer of an adapter's texts, its own or the base's; may read a file."""
        ...

    def generation_for(self, info: AdapterInfo) -> TextGeneration:
        """As `encoder_for`, for prompts; raises InvalidRequest on `adapter` when the base generates nothing."""
        ...

    @property
    def base_name(self) -> str: ...

    def warm_up(self) -> None:
        """Compile and capture what steps need for the adapters that are READY; blocks."""
        ...

    def stats(self) -> RunnerStats:
        """What the runner did so far; from any thread."""
        ...

    def close(self, drain_seconds: float = 10.0) -> None: ...


class ServerStarting(MultiloraError):
    """The base, or an adapter to be preloaded, is still being loaded."""

    reason = "SERVER_STARTING"


class BackendSlot:
    """Where RPCs find the backend: empty while it is loaded, and again once the server stops."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._stopped = False

    def publish(self, backend: Backend) -> None:
        self._backend = backend

    def withdraw(self) -> None:
        self._backend, self._stopped = None, True

    def get(self) -> Backend:
        """The backend; raises ServerStarting before `publish` and EngineStopped after `withdraw`."""
        if self._backend is not None:
            return self._backend
        if self._stopped:
            raise EngineStopped("the server is stopping; ask another replica")
        raise ServerStarting("the server is still loading its base model; try again in a few seconds")


async def completion(future: Future[T]) -> T:
    """The result of an engine's future.

    Unlike `asyncio.wrap_future`, a cancelled waiter does not cancel the engine's future: only the engine
    completes it, so that it never finds it done already.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Future[T]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    await done.wait()
    return future.result()
