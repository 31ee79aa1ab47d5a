"""What `multilora bench generate` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROMPT_TOKENS = 32
LONG_PROMPT_TOKENS = 512  # of the one that arrives amid others, where the base's context allows it
RANKS = (8, 16)  # of the adapters, in turn
NUM_CHECKED = 4  # adapters whose texts are compared with PEFT's, and with themselves alone


@dataclass(frozen=True, slots=True)
class GenerateBench:
    """What is measured."""

    base: str  # a folder, a hub name or a GGUF file
    num_adapters: int = 16
    requests: int = 16  # at once
    new_tokens: int = 64  # of each
    rounds: int = 5
    threads: int = 2
    prompt_tokens: int = PROMPT_TOKENS
    vllm_python: Path | None = None  # an interpreter that has vLLM for CPUs
