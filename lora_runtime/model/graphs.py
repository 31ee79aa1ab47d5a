"""The backbone's forward pass captured for buckets of tokens, so that a step costs one launch instead of hundreds.

A graph reads a batch from tensors whose addresses stay: ids, types, positions and ends of sequences in one buffer, and
for LoRA a list of tiles. A batch that is smaller than its bucket is filled up with tokens of no adapter in sequences of
their own. Where adapters lie is on the device too, so that loading and evicting them needs no new capture.

A graph is captured for a `Variant`: the site groups that it launches LoRA kernels for, and the largest rank. A batch
takes the smallest variant that covers it; without one, or where it holds what no graph has, it runs eagerly and is
counted with the reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from lora_runtime.arena import BASE_SLOT, SlotTable
from lora_runtime.batch import Batch, Owners, Resident, Row, Step
from lora_runtime.kernels.grouped_lora import LoraPlan
from lora_runtime.kernels.grouped_lora.triton_backend.capturable import CapturableLora
from lora_runtime.kernels.grouped_lora.triton_backend.tiles import TileList
from lora_runtime.model.base import ForwardInputs, MakeStep, PackedBackbone, run_backbone
from lora_runtime.model.capture import Captured, Forward, GraphCapture
from lora_runtime.packing import PAD_SEQUENCE, InputBuffer, PackedLayout

logger = logging.getLogger(__name__)

_LEAST_TOKENS = 16  # of the smallest bucket
_LEAST_SEQUENCES = 16
_TOKENS_PER_SEQUENCE = 8  # a bucket has room for sequences as short as this; more of them take a larger bucket
_LEAST_RANK, _USUAL_RANK = 8, 16


class Eager(StrEnum):
    """Why a batch was not replayed."""

    EXTRAS = "extras"  # an adapter changes more than LoRA does, or not all of its tokens
    SIZE = "size"  # too many tokens or sequences for the largest bucket, or a sequence too long
    CACHED = "cached"  # it continues sequences over the KV cache
    VARIANT = "variant"  # no graph for its site groups and rank


@dataclass(frozen=True, slots=True)
class Variant:
    """The site groups, by index, whose LoRA kernels a graph has, and the largest rank of a site that they take."""

    groups: frozenset[int] = frozenset()
    rank: int = 0

    def covers(self, other: Variant) -> bool:
        return self.groups >= other.groups and self.rank >= other.rank


NO_LORA = Variant()
_Key = tuple[int, Variant]  # tokens of the bucket


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """For which batches graphs are captured, and how much memory they may take."""

    num_bytes: int  # by which the memory that torch holds may grow
    buckets: tuple[int, ...]  # tokens, ascending
    max_sequences: int  # of a batch
    max_length: int  # tokens of a sequence

    @classmethod
    def usual(cls, num_bytes: int, token_budget: int, max_sequences: int, max_length: int) -> GraphSettings:
        """Buckets that double from 16 up to the token budget."""
        sizes = [_LEAST_TOKENS]
        while sizes[-1] * 2 < token_budget:
            sizes.append(sizes[-1] * 2)
        if sizes[-1] < token_budget:
            sizes.append(token_budget)
        return cls(num_bytes, tuple(sizes), max_sequences, max_length)


@dataclass(slots=True)
class GraphStats:
    """Of one backbone, since it was made."""

    captured: int = 0  # graphs there are
    replayed: int = 0
    eager: Counter[Eager] = field(default_factory=Counter[Eager])
    num_bytes: int = 0  # by which the memory that torch holds has grown with captures


class StaticStep(Step):
    """The step of a capture: one plan for all token modules, without extras, whose content comes with each batch."""

    is_static = True

    def __init__(self, batch: Batch, slots: SlotTable, lora: CapturableLora, plan: LoraPlan) -> None:
        super().__init__(batch, slots, lora)
        self._static = Owners(plan, (), leading=2)

    def owners(self, x: torch.Tensor) -> Owners:
        del x
        return self._static

    @property
    def tokens(self) -> Owners:
        return self._static


class _Bucket:
    """The tensors that all graphs of one number of tokens read."""

    def __init__(self, num_tokens: int, settings: GraphSettings, device: torch.device) -> None:
        fillers = -(-num_tokens // PAD_SEQUENCE)
        room = max(_LEAST_SEQUENCES, num_tokens // _TOKENS_PER_SEQUENCE)
        self.layout = PackedLayout(num_tokens, min(room, settings.max_sequences + fillers))
        self.inputs = InputBuffer(self.layout, device)
        self.tiles: dict[int, TileList] = {}  # by the rank that they take
        views = self.inputs.inputs
        self.batch = Batch(
            rows=(),
            input_ids=views.input_ids,
            token_type_ids=views.token_type_ids,
            position_ids=views.position_ids,
            pad_ids=views.pad_ids,
            cu_seqlens=views.cu_seqlens,
            lengths=(),
            equal_runs=(),
            max_length=max(min(num_tokens, settings.max_length), min(num_tokens, PAD_SEQUENCE)),
        )

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens

    def tiles_for(self, rank: int, tile_rows: int) -> TileList:
        """The list of tiles of graphs for `rank`; each sequence may leave one of its tiles part empty."""
        if rank not in self.tiles:
            capacity = min(self.num_tokens, self.num_tokens // tile_rows + self.layout.num_sequences)
            device = self.batch.input_ids.device
            self.tiles[rank] = TileList(capacity, tile_rows, device, max_rank=rank)
        return self.tiles[rank]


class GraphedBackbone:
    """A packed backbone whose usual batches are replayed. Used from the engine thread alone, in inference mode."""

    def __init__(
        self,
        packed: PackedBackbone,
        lora: CapturableLora,
        slots: SlotTable,
        capture: GraphCapture,
        settings: GraphSettings,
    ) -> None:
        """Without a graph until `capture` is called."""
        self._packed = packed
        self._lora = lora
        self._slots = slots
        self._capture = capture
        self._settings = settings
        self._token_groups = frozenset(g.index for g in slots.groups if not any(s.per_sequence for s in g.sites))
        self._buckets = [_Bucket(n, settings, packed.inputs.device) for n in settings.buckets]
        self._graphs: dict[_Key, Captured] = {}
        self._found: dict[_Key, Variant | None] = {}  # what `_lookup` has found
        self._generation = lora.device_slots.generation
        self.stats = GraphStats()

    @property
    def inputs(self) -> ForwardInputs:
        return self._packed.inputs

    @property
    def captured(self) -> frozenset[_Key]:
        """(tokens, variant) of each graph."""
        return frozenset(self._graphs)

    def hidden(self, rows: Sequence[Row], make_step: MakeStep) -> torch.Tensor:
        """[T, d] in the order of `rows`, by a graph where there is one."""
        self._follow_slots()
        found = self._choose(rows)
        if isinstance(found, Eager):
            self.stats.eager[found] += 1
            return self._packed.hidden(rows, make_step)
        bucket, variant = found
        batch = Batch.pack(rows, padding_idx=self.inputs.padding_idx, into=bucket.inputs)
        step = make_step(batch)
        if variant.groups:
            bucket.tiles[variant.rank].fill(step.tokens.plan)
        hidden = self._graphs[bucket.num_tokens, variant].replay()
        self.stats.replayed += 1
        return hidden[: batch.num_tokens].clone()  # the next replay overwrites it

    def capture(self) -> int:
        """Capture what is missing for the base and the adapters that are READY now; returns how many graphs that were.

        First without LoRA, then the groups that most adapters have, then all that they have together, then all groups;
        it ends where the memory does.
        """
        self._follow_slots()
        before = len(self._graphs)
        keys = [(bucket, variant) for variant in self._wanted() for bucket in reversed(self._buckets)]
        for bucket, variant in keys:
            if (bucket.num_tokens, variant) not in self._graphs and not self._add(bucket, variant):
                break
        logger.info("%d graphs captured, %.0f MiB", len(self._graphs), self.stats.num_bytes / (1 << 20))
        return len(self._graphs) - before

    def _follow_slots(self) -> None:
        """Bring the device's slots up to date; capture anew where the table outgrew the tensors that graphs read."""
        self._lora.device_slots.refresh()
        if self._generation == self._lora.device_slots.generation:
            return
        self._generation = self._lora.device_slots.generation
        stale = [key for key in self._graphs if key[1].groups]
        logger.info("more adapters than ever: %d graphs are captured again", len(stale))
        for key in stale:
            del self._graphs[key]
        self._found.clear()
        self.stats.captured = len(self._graphs)
        buckets = {bucket.num_tokens: bucket for bucket in self._buckets}
        for num_tokens, variant in stale:
            if not self._add(buckets[num_tokens], variant):
                break

    def _choose(self, rows: Sequence[Row]) -> tuple[_Bucket, Variant] | Eager:
        residents = {row.resident for row in rows}
        if any(r.extras or r.alone or r.card.invocation_tokens is not None for r in residents):
            return Eager.EXTRAS
        if any(row.cached is not None for row in rows):
            return Eager.CACHED
        lengths = [row.sequence.num_tokens for row in rows]
        total, longest = sum(lengths), max(lengths)
        fitting = (b for b in self._buckets if b.layout.holds(total, len(rows)) and b.batch.max_length >= longest)
        if (bucket := next(fitting, None)) is None:
            return Eager.SIZE
        variant = self._lookup(bucket.num_tokens, self._needed(residents))
        return Eager.VARIANT if variant is None else (bucket, variant)

    def _needed(self, residents: set[Resident]) -> Variant:
        return self._variant([r.slot for r in residents if r.slot != BASE_SLOT])

    def _variant(self, slots: Sequence[int] | np.ndarray[Any, Any]) -> Variant:
        """What these slots need together."""
        if not len(slots):
            return NO_LORA
        active = self._slots.group_rank[slots].any(axis=0)
        groups = self._token_groups.intersection(np.flatnonzero(active).tolist())
        if not groups:
            return NO_LORA
        rank = int(self._slots.rank[torch.as_tensor(slots)].max())
        return Variant(groups, max(_LEAST_RANK, 1 << (rank - 1).bit_length()))

    def _lookup(self, num_tokens: int, needed: Variant) -> Variant | None:
        """The smallest captured variant that covers what is needed."""
        key = num_tokens, needed
        if key not in self._found:
            covering = [v for tokens, v in self._graphs if tokens == num_tokens and v.covers(needed)]
            self._found[key] = min(covering, key=lambda v: (len(v.groups), v.rank), default=None)
        return self._found[key]

    def _wanted(self) -> list[Variant]:
        ready = np.flatnonzero(self._slots.group_rank.any(axis=1))
        counted = Counter(self._variant([int(slot)]) for slot in ready)
        together = self._variant(ready)
        everything = Variant(self._token_groups, max(together.rank, _USUAL_RANK))
        return list(dict.fromkeys([NO_LORA, *(v for v, _ in counted.most_common()), together, everything]))

    def _add(self, bucket: _Bucket, variant: Variant) -> bool:
        """Capture one graph; False where that is impossible, or more than the memory there is for graphs."""
        before = self._capture.reserved_bytes()
        forward = self._forward_of(bucket, variant)
        try:
            with torch.inference_mode():
                captured = self._capture.capture(forward)
        except RuntimeError as error:
            reason = str(error).strip().split("\n", 1)[0]
            logger.warning("%d tokens cannot be captured and run eagerly: %s", bucket.num_tokens, reason)
            return False
        grown = max(0, self._capture.reserved_bytes() - before)
        if self.stats.num_bytes + grown > self._settings.num_bytes:
            logger.warning("%d MiB for graphs are used up; other batches run eagerly", self._settings.num_bytes >> 20)
            return False
        self.stats.num_bytes += grown
        self._graphs[bucket.num_tokens, variant] = captured
        self.stats.captured = len(self._graphs)
        self._found.clear()
        return True

    def _forward_of(self, bucket: _Bucket, variant: Variant) -> Forward:
        """A call of the backbone that reads the bucket's tensors alone."""
        plan = self._static_plan(bucket, variant)
        if variant.groups:
            self._lora.prepare(plan)

        def forward() -> torch.Tensor:
            step = StaticStep(bucket.batch, self._slots, self._lora, plan)
            return run_backbone(self.inputs.module, self.inputs.arguments(bucket.batch), step)[0]

        return forward

    def _static_plan(self, bucket: _Bucket, variant: Variant) -> LoraPlan:
        if not variant.groups:
            return LoraPlan(bucket.num_tokens, (), self._slots)
        tiles = bucket.tiles_for(variant.rank, self._lora.tile_rows_for(bucket.num_tokens))
        plan = tiles.static_plan(self._slots, bucket.num_tokens)
        plan.cache.update({("active", g.index): () for g in self._slots.groups if g.index not in variant.groups})
        plan.cache["touched"] = [g.index in variant.groups for g in self._slots.groups]
        return plan
