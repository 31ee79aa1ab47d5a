"""Proof at load: packed sequences must equal the same sequences run apart by the unmodified base.

Some architectures accept our attention function and ignore it; they would attend from one request to another. So
the function's calls are counted, and outputs compared, before a base serves anything.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_runtime.arena import ALIGNMENT, RankArena, SlotTable
from lora_runtime.batch import Batch, Row, Step, current_step
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.heads import TaskHead
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.model.attention import PACKED_ATTENTION
from lora_runtime.model.base import PackedBackbone
from lora_runtime.types import SiteGroup, TokenSequence

PROBE_TOLERANCE = 1e-5  # of the largest hidden value, fp32


@dataclass(frozen=True, slots=True)
class SeparateOutputs:
    """What the unmodified base answers to each probe sequence alone, by its own attention and positions."""

    hidden: tuple[torch.Tensor, ...]  # [n, d] each
    logits: tuple[torch.Tensor, ...]  # [num_labels] each, by the head as it was drawn
    ids: tuple[tuple[int, ...], ...]


def separate_outputs(model: Any, backbone: nn.Module) -> SeparateOutputs:
    """Run the task class and its backbone on each probe sequence."""
    ids = _probe_ids(model.config)
    hidden = tuple(backbone(input_ids=torch.tensor([i])).last_hidden_state[0] for i in ids)
    return SeparateOutputs(hidden, tuple(model(input_ids=torch.tensor([i])).logits[0] for i in ids), ids)


def prove_packed(
    backbone: nn.Module, config: Any, groups: tuple[SiteGroup, ...], expected: SeparateOutputs, name: str
) -> PackedBackbone:
    """Switch a wrapped backbone to packed attention; raises BaseModelUnsupported unless it equals `expected`."""
    backbone.set_attn_implementation(PACKED_ATTENTION)  # pyright: ignore[reportCallIssue]
    step = _step([Row(TokenSequence(ids, None)) for ids in expected.ids], groups)
    takes_types = "token_type_ids" in inspect.signature(backbone.forward).parameters
    errors: list[float] = []
    for padding_idx in (None, getattr(config, "pad_token_id", None)):
        packed = PackedBackbone(backbone, takes_types, padding_idx)
        error = _error(packed, step, torch.cat(expected.hidden), name)
        _check_counted(step, config, name)
        if error <= PROBE_TOLERANCE:
            return packed
        errors.append(error)
    raise BaseModelUnsupported(
        f"base {name}: packed sequences differ from separate ones by {min(errors):.1e} of the largest hidden value "
        f"(limit {PROBE_TOLERANCE:.0e}), so requests could see each other; it is not served",
        base=name,
    )


def prove_head(
    head: TaskHead,
    drawn: dict[str, torch.Tensor],
    groups: tuple[SiteGroup, ...],
    expected: SeparateOutputs,
    name: str,
) -> None:
    """Raise BaseModelUnsupported unless the head, given `drawn` as an adapter's parameters, gives `expected`."""
    rows = [Row(TokenSequence(ids, None), task=head.spec.task, params=drawn) for ids in expected.ids]
    step = _step(rows, groups)
    with torch.inference_mode():
        head.probe_first_token(step, expected.hidden)
        found = head.run(step, torch.cat(expected.hidden))
        try:
            errors = [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected.logits, strict=True)]
        except RuntimeError:  # shapes that do not even meet
            errors = [float("inf")]
    if not max(errors) <= PROBE_TOLERANCE:
        raise BaseModelUnsupported(
            f"base {name}: its {head.spec.task} head gives other logits around given hidden states "
            f"({max(errors):.1e} of the largest, limit {PROBE_TOLERANCE:.0e}); the architecture is not served yet",
            base=name,
        )


def _step(rows: list[Row], groups: tuple[SiteGroup, ...]) -> Step:
    slots = SlotTable(sum(len(group.sites) for group in groups), groups, num_slots=1)
    return Step(Batch.pack(rows), slots, ReferenceGroupedLora(RankArena(ALIGNMENT * 4)))


def _error(packed: PackedBackbone, step: Step, expected: torch.Tensor, name: str) -> float:
    token = current_step.set(step)
    try:
        with torch.inference_mode():
            found = packed(step.batch)
    except IndexError:  # positions beyond the table: the other way of counting is the right one
        return float("inf")
    except BaseModelUnsupported as error:
        raise BaseModelUnsupported(f"base {name}: {error.message}", base=name) from error
    finally:
        current_step.reset(token)
    return float((found - expected).abs().max() / expected.abs().max())


def _check_counted(step: Step, config: Any, name: str) -> None:
    called, layers = len(step.attention_modules), int(config.num_hidden_layers)
    shared = int(getattr(config, "num_hidden_groups", layers) or layers)  # ALBERT runs one layer many times
    if called not in (layers, shared):
        raise BaseModelUnsupported(
            f"base {name}: packed attention ran in {called} of {layers} layers; the architecture has its own attention",
            base=name,
        )


def _probe_ids(config: Any) -> tuple[tuple[int, ...], ...]:
    """Three sequences of different lengths, one longer than any sliding window."""
    window = int(getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or 0)
    positions = int(getattr(config, "max_position_embeddings", 512) or 512)
    lengths = (7, max(2, min(2 * window + 9, positions - 4)), 5)
    generator = torch.Generator().manual_seed(0)
    reserved = min(5, int(config.vocab_size) - 1)  # special tokens lie first in most vocabularies
    return tuple(
        tuple(torch.randint(reserved, int(config.vocab_size), (n,), generator=generator).tolist()) for n in lengths
    )
