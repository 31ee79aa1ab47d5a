"""What a sampler keeps of one sequence. Depends on its tokens alone, so a preempted sequence is rebuilt from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from lora_runtime.sampling.params import SamplingParams
from lora_runtime.sampling.uniform import sample_seed

Bitmask = np.ndarray[Any, np.dtype[np.uint8]]
Ids = np.ndarray[Any, np.dtype[np.int64]]
Counts = np.ndarray[Any, np.dtype[np.float32]]

_ROOM = 256  # generated tokens that fit before the arrays grow


class LogitsMask(Protocol):
    """Which tokens may come next in one sequence, such as a grammar's."""

    def allowed(self) -> Bitmask:
        """Token t may come next when bit `t % 8` of byte `t // 8` is set; tokens past its end may not."""
        ...

    def accept(self, token_id: int) -> None:
        """Take the token that was drawn."""
        ...


class RowState:
    """One sequence: its parameters, its seed, the tokens seen so far, and its mask.

    `params` come from `seeded()`. `generated` are tokens drawn before (a sequence that was preempted); `mask` is a
    fresh one and takes them too. `eos_token_ids` are those that end a sequence of this model.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        eos_token_ids: Iterable[int] = (),
        generated: Sequence[int] = (),
        mask: LogitsMask | None = None,
        sample_index: int = 0,
    ) -> None:
        assert params.seed is not None, "admission calls seeded()"
        self.params = params
        self.mask = mask
        self.seed = sample_seed(params.seed, sample_index)
        self.num_new_tokens = 0
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self._ends = np.array(sorted(ends), np.int64)
        seen = np.unique(np.asarray(prompt, np.int64)) if params.has_penalties else np.empty(0, np.int64)
        self._size = len(seen)
        self._ids = np.concatenate([seen, np.empty(_ROOM, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)
        self._places = {token: place for place, token in enumerate(seen.tolist())}
        for token in generated:
            self.append(token)

    def append(self, token_id: int) -> None:
        """Take a generated token."""
        self.num_new_tokens += 1
        if self.mask is not None:
            self.mask.accept(token_id)
        if not self.params.has_penalties:
            return
        place = self._places.setdefault(token_id, self._size)
        if place == self._size:
            self._grow()
            self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def seen(self) -> tuple[Ids, Counts]:
        """Distinct tokens of prompt and output, and how often each was generated. Empty without penalties."""
        return self._ids[: self._size], self._counts[: self._size]

    @property
    def blocked(self) -> Ids:
        """Tokens that would end the sequence before `min_new_tokens`."""
        return self._ends if self.num_new_tokens < self.params.min_new_tokens else self._ends[:0]

    def _grow(self) -> None:
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._size += 1
