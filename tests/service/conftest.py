"""A folder of fake adapters and a server over it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, running


@pytest.fixture
def adapter_root(tmp_path: Path) -> Path:
    """Adapters `spam` (2 labels), `topics` (4), `short` (at most 6 tokens) and two that are refused."""
    root = tmp_path / "adapters"
    write_adapter(root / "spam", labels=["ham", "spam"])
    write_adapter(root / "topics", labels=["art", "law", "sport", "tech"])
    write_adapter(root / "short", labels=["no", "yes"], max_length=6)
    write_adapter(root / "nan", labels=["no", "yes"], weights="broken")
    (root / "garbled").mkdir()
    (root / "garbled" / "adapter_config.json").write_text("{not json")
    (root / "notes").mkdir()  # no adapter_config.json: not an adapter
    return root


@pytest.fixture
async def server(adapter_root: Path) -> AsyncGenerator[Harness]:
    async with running(adapter_root, max_inputs=8, max_queued_sequences=8) as harness:
        yield harness


@pytest.fixture
async def tasks(tmp_path: Path) -> AsyncGenerator[Harness]:
    """A server with an adapter for each task: `spam`, `people`, `reader`, `vectors` (CLS, of length 1), `writer`."""
    root = tmp_path / "tasks"
    write_adapter(root / "spam", labels=["ham", "spam"])
    write_adapter(root / "people", task="classify_tokens", labels=["O", "B-PER", "I-PER"])
    write_adapter(root / "reader", task="answer", labels=[])
    write_adapter(root / "vectors", task="embed", pooling="cls", normalize=True)
    write_adapter(root / "writer", task="generate")
    write_adapter(root / "spelled", task="embed", max_length=6, tokenizer_sha256="cd" * 32)
    async with running(root, max_inputs=8, max_queued_sequences=8) as harness:
        yield harness
