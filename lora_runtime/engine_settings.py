"""What bounds one engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of one engine."""

    token_budget: int = 256  # tokens per step
    max_batch_sequences: int = 256
    num_loader_threads: int = 1
    num_threads: int | None = None  # torch's intra-op threads; None leaves torch's choice
    max_generating: int = 128  # sequences that generate at once, see `most_generating`
    beside_tokens: int | None = None  # most in a step beside sequences that generate; None: what the budget leaves
    reuse_prefixes: bool = True  # keep the keys and values of prompts for others that begin alike
    run_ahead: bool = False  # plan and launch a step while the one before computes: where that is beside the host

    @property
    def most_generating(self) -> int:
        """`max_generating`, or half of what a step takes if that is less: prompts need the rest."""
        return max(1, min(self.max_generating, self.max_batch_sequences // 2, self.token_budget // 2))
