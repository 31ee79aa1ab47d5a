"""The resident base as the runner sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.batch import Batch, Resident, Row, Step, current_step
from lora_runtime.heads import PooledHead, TaskHead
from lora_runtime.kv_blocks import KvConfig
from lora_runtime.model.placement import CPU, PROVED, Placement
from lora_runtime.types import Task

MakeStep = Callable[[Batch], Step]

# Padding is computed and thrown away: a padded batch ends where more than half of it would be padding.
_MAX_PADDED_RATIO = 2.0


class Backbone(Protocol):
    """Hidden states of rows, whatever the base needs to compute them."""

    @property
    def inputs(self) -> ForwardInputs: ...

    def hidden(self, rows: Sequence[Row], make_step: MakeStep) -> torch.Tensor:
        """[T, d] in the order of `rows`, each sequence attending to itself alone."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What a backbone's forward takes.

    `padding_idx` is None where positions count from 0. The RoBERTa family counts from `padding_idx + 1` and does
    not count tokens that are the padding token; it is set to that token there.
    """

    module: nn.Module
    takes_token_types: bool
    takes_positions: bool
    takes_cache: bool  # a decoder, which would otherwise keep keys and values
    padding_idx: int | None
    device: torch.device = CPU

    def arguments(self, batch: Batch) -> dict[str, torch.Tensor | bool]:
        """Keyword arguments of packed tokens, [1, T] each."""
        inputs: dict[str, torch.Tensor | bool] = {"input_ids": batch.input_ids[None]}
        if self.takes_positions:
            inputs["position_ids"] = batch.position_ids[None]
        if self.takes_token_types:
            inputs["token_type_ids"] = batch.token_type_ids[None]
        if self.takes_cache:
            inputs["use_cache"] = False
        return inputs


@dataclass(frozen=True, slots=True)
class PackedBackbone:
    """A backbone that runs all sequences as one row of tokens, through our attention function."""

    inputs: ForwardInputs

    def hidden(self, rows: Sequence[Row], make_step: MakeStep) -> torch.Tensor:
        """[T, d]."""
        batch = Batch.pack(rows, self.inputs.device, padding_idx=self.inputs.padding_idx)
        return run_backbone(self.inputs.module, self.inputs.arguments(batch), make_step(batch))[0]


@dataclass(frozen=True, slots=True)
class PaddedBackbone:
    """A backbone with an attention of its own, which sees sequences padded on the right, [N, L], and a mask.

    Rows are put in batches of like length. An adapter that changes a module which the base runs once for all
    sequences (`Resident.alone`) gets batches of its own.
    """

    inputs: ForwardInputs
    pad_id: int

    def hidden(self, rows: Sequence[Row], make_step: MakeStep) -> torch.Tensor:
        """[T, d]."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for chosen in like_lengths(rows):
            own, padding_idx = [rows[i] for i in chosen], self.inputs.padding_idx
            batch = Batch.pack(own, self.inputs.device, padded=True, padding_idx=padding_idx)
            padded = run_backbone(self.inputs.module, self._arguments(batch), make_step(batch))  # [N, L, d]
            for place, i in enumerate(chosen):
                found[i] = padded[place, : batch.lengths[place]]
        return torch.cat(found)

    def _arguments(self, batch: Batch) -> dict[str, torch.Tensor | bool]:
        assert batch.padded_length is not None
        counts = batch.cu_seqlens.diff()[:, None]
        real = torch.arange(batch.padded_length, device=counts.device)[None, :] < counts
        packed = self.inputs.arguments(batch)
        padded: dict[str, torch.Tensor | bool] = {"attention_mask": real.long()}
        for name, value in packed.items():
            if isinstance(value, torch.Tensor):
                filler = self.pad_id if name == "input_ids" else (self.inputs.padding_idx or 0)
                filler = 0 if name == "token_type_ids" else filler
                padded[name] = value.new_full(real.shape, filler).masked_scatter_(real, value[0])
            else:
                padded[name] = value
        return padded


def run_backbone(module: nn.Module, arguments: dict[str, Any], step: Step) -> torch.Tensor:
    """The hidden states of a backbone within `step`, [1, T, d] or [N, L, d]."""
    token = current_step.set(step)
    try:
        return module(**arguments).last_hidden_state
    finally:
        current_step.reset(token)


def like_lengths(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of rows, in batches of like length; in each, the rows of one adapter are adjacent."""
    of_owner: dict[int, list[int]] = {}
    place: dict[Resident, int] = {}
    for i, row in enumerate(rows):
        place.setdefault(row.resident, len(place))
        of_owner.setdefault(place[row.resident] if row.resident.alone else -1, []).append(i)
    batches: list[list[int]] = []
    for members in of_owner.values():
        real = 0
        current: list[int] = []
        for i in sorted(members, key=lambda i: rows[i].sequence.num_tokens):
            length = rows[i].sequence.num_tokens
            if current and length * (len(current) + 1) > _MAX_PADDED_RATIO * (real + length):
                batches.append(current)
                current, real = [], 0
            current.append(i)
            real += length
        batches.append(current)
    return [sorted(batch, key=lambda i: place[rows[i].resident]) for batch in batches]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base whose modules are wrapped and whose forward was proved to keep sequences apart."""

    spec: BaseSpec
    backbone: Backbone
    heads: dict[Task, TaskHead | PooledHead]
    tokenizer: PreTrainedTokenizerBase
    placement: Placement = PROVED
    kv: KvConfig | None = None  # of a decoder that was proved to continue sequences over a KV cache
    cannot_continue: str = ""  # why there is none
    config: Any = None  # transformers'
    generation_config: Any = None  # transformers', None where the base has none
