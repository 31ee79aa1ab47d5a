"""The resident base as the runner sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.batch import Batch
from lora_runtime.heads import TaskHead
from lora_runtime.types import Task


@dataclass(frozen=True, slots=True)
class PackedBackbone:
    """A backbone run on packed sequences.

    `padding_idx` is None where positions count from 0. The RoBERTa family counts from `padding_idx + 1` and does
    not count tokens that are the padding token; it is set to that token there.
    """

    module: nn.Module
    takes_token_types: bool
    padding_idx: int | None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, d] of a batch; the caller has set the current step."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids[None],
            "position_ids": self._positions(batch)[None],
        }
        if self.takes_token_types:
            inputs["token_type_ids"] = batch.token_type_ids[None]
        return self.module(**inputs).last_hidden_state[0]

    def _positions(self, batch: Batch) -> torch.Tensor:
        if self.padding_idx is None:
            return batch.position_ids
        counted = batch.input_ids != self.padding_idx
        total = counted.cumsum(0)
        starts = batch.cu_seqlens[:-1].long()
        before = (total[starts] - counted[starts].long()).repeat_interleave(torch.tensor(batch.lengths))
        return torch.where(counted, total - before + self.padding_idx, self.padding_idx)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base whose sites are wrapped and whose packed forward was proved exact."""

    spec: BaseSpec
    backbone: PackedBackbone
    heads: dict[Task, TaskHead]
    tokenizer: PreTrainedTokenizerBase
    hidden_size: int
