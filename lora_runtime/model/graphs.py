"""The backbone's forward pass captured for buckets of tokens, so that a step costs one launch instead of hundreds.

A graph reads a batch from tensors whose addresses stay: ids, types, positions and ends of sequences in one buffer, for
LoRA a list of tiles, and for sequences that continue by one token each a list of their blocks of the KV cache. A batch
that is smaller than its bucket is filled up with tokens of no adapter in sequences of their own. Where adapters lie is
on the device too, so that loading and evicting them needs no new capture.

A graph is captured for a `Variant`: the site groups that it launches LoRA kernels for, and the largest rank. A batch
takes the smallest variant that covers it; without one, or where it holds what no graph has, it runs eagerly and is
counted with the reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch

from lora_runtime.arena import BASE_SLOT, SlotTable
from lora_runtime.batch import Batch, Owners, PagedAttention, Resident, Row, Step
from lora_runtime.kernels.grouped_lora import LoraPlan
from lora_runtime.kernels.grouped_lora.triton_backend.capturable import CapturableLora
from lora_runtime.model.base import ForwardInputs, MakeStep, PackedBackbone, run_backbone
from lora_runtime.model.buckets import Bucket, DecodeBucket, GraphSettings
from lora_runtime.model.capture import Captured, Forward, GraphCapture
from lora_runtime.model.paged import PagedLayers
from lora_runtime.types import SiteGroup

logger = logging.getLogger(__name__)

_LEAST_RANK, _USUAL_RANK = 8, 16
_MOST_NEEDS = 1024  # sets of slots whose variants are remembered


class Eager(StrEnum):
    """Why a batch was not replayed."""

    EXTRAS = "extras"  # an adapter changes more than LoRA does, or not all of its tokens
    SIZE = "size"  # too many tokens or sequences for the largest bucket, or a sequence too long
    CACHED = "cached"  # it continues sequences over the KV cache, and not all by one token, or by gathers
    VARIANT = "variant"  # no graph for its site groups and rank


@dataclass(frozen=True, slots=True)
class Variant:
    """The site groups, by index, whose LoRA kernels a graph has, and the largest rank of a site that they take."""

    groups: frozenset[int] = frozenset()
    rank: int = 0

    def covers(self, other: Variant) -> bool:
        return self.groups >= other.groups and self.rank >= other.rank


NO_LORA = Variant()


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a graph is for."""

    num_tokens: int  # of the bucket
    variant: Variant
    continues: bool = False  # every token is of another sequence that goes on


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

    def __init__(
        self,
        batch: Batch,
        slots: SlotTable,
        lora: CapturableLora,
        plan: LoraPlan,
        paged: PagedAttention | None,
        beside: torch.cuda.Stream | None,
    ) -> None:
        """`beside`: a stream on which shrinks are computed while the base's products are."""
        super().__init__(batch, slots, lora)
        self.paged = paged
        self._static = Owners(plan, (), leading=2)
        self._beside = beside
        self._is_beside = False  # whether the shrink that is kept is computed there

    def owners(self, x: torch.Tensor) -> Owners:
        del x
        return self._static

    @property
    def tokens(self) -> Owners:
        return self._static

    def begin_shrink(self, x: torch.Tensor, group: SiteGroup) -> None:
        """See Step. The first site of a group asks; what is kept then is of this very input."""
        kept = self._shrunk
        if self._beside is None or not self._static.plan.touches(group):
            return
        if kept is not None and kept[0] == group.index and kept[1] is x:
            return
        self._beside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._beside):
            super().shrink(x, group, self._static.plan)
        self._is_beside = True

    def shrink(self, x: torch.Tensor, group: SiteGroup, plan: LoraPlan) -> Any:
        if self._is_beside:
            assert self._beside is not None
            torch.cuda.current_stream(x.device).wait_stream(self._beside)
            self._is_beside = False
        return super().shrink(x, group, plan)


class GraphedBackbone:
    """A packed backbone whose usual batches are replayed. Used from the engine thread alone, in inference mode."""

    def __init__(
        self,
        packed: PackedBackbone,
        lora: CapturableLora,
        slots: SlotTable,
        capture: GraphCapture,
        settings: GraphSettings,
        paged: PagedLayers | None = None,
    ) -> None:
        """Without a graph until `capture` is called. Steps over `paged` are captured whose attention is one call."""
        self.packed = packed  # what runs eagerly
        self._lora = lora
        self._slots = slots
        self._capture = capture
        self._settings = settings
        self._token_groups = frozenset(g.index for g in slots.groups if not any(s.per_sequence for s in g.sites))
        device = packed.inputs.device
        self._buckets = [Bucket.of_sequences(n, settings, device) for n in settings.buckets]
        self._decodes: list[Bucket] = []
        if paged is not None and paged.cache.spare_block is not None:
            self._decodes = [DecodeBucket(n, settings, paged, device) for n in settings.decodes]
        self._graphs: dict[GraphKey, Captured] = {}
        self._found: dict[GraphKey, Variant | None] = {}  # what `_lookup` has found
        self._needs: dict[frozenset[int], Variant] = {}  # what `_needed` has found, of slots at `_needs_version`
        self._needs_version = slots.version
        self._generation = lora.device_slots.generation
        self.stats = GraphStats()

    @property
    def inputs(self) -> ForwardInputs:
        return self.packed.inputs

    @property
    def captured(self) -> frozenset[GraphKey]:
        """(tokens, variant) of each graph."""
        return frozenset(self._graphs)

    def hidden(self, rows: Sequence[Row], make_step: MakeStep) -> torch.Tensor:
        """[T, d] in the order of `rows`, by a graph where there is one."""
        self._follow_slots()
        found = self._choose(rows)
        if isinstance(found, Eager):
            self.stats.eager[found] += 1
            return self.packed.hidden(rows, make_step)
        bucket, variant = found
        batch = bucket.pack(rows, self.inputs.padding_idx)
        step = make_step(batch)
        if variant.groups:
            bucket.tiles(variant.rank).fill(step.tokens.plan)
        hidden = self._graphs[_key(bucket, variant)].replay()
        self.stats.replayed += 1
        return hidden[: batch.num_tokens].clone()  # the next replay overwrites it

    def capture(self) -> int:
        """Capture what is missing for the base and the adapters that are READY now; returns how many graphs that were.

        First without LoRA, then the groups that most adapters have, then all that they have together, then all groups;
        it ends where the memory does.
        """
        self._follow_slots()
        before = len(self._graphs)
        able = [list(reversed(buckets)) for buckets in (self._decodes, self._buckets) if buckets]
        for variant in self._wanted():
            able = [buckets for buckets in able if all(self._has(bucket, variant) for bucket in buckets)]
        logger.info("%d graphs captured, %.0f MiB", len(self._graphs), self.stats.num_bytes / (1 << 20))
        return len(self._graphs) - before

    def _follow_slots(self) -> None:
        """Bring the device's slots up to date; capture anew where the table outgrew the tensors that graphs read."""
        self._lora.device_slots.refresh()
        if self._generation == self._lora.device_slots.generation:
            return
        self._generation = self._lora.device_slots.generation
        stale = [key for key in self._graphs if key.variant.groups]
        logger.info("more adapters than ever: %d graphs are captured again", len(stale))
        for key in stale:
            del self._graphs[key]
        self._found.clear()
        self.stats.captured = len(self._graphs)
        buckets = {_key(bucket, NO_LORA): bucket for bucket in (*self._decodes, *self._buckets)}
        for key in stale:
            if not self._add(buckets[replace(key, variant=NO_LORA)], key.variant):
                break

    def _choose(self, rows: Sequence[Row]) -> tuple[Bucket, Variant] | Eager:
        residents = {row.resident for row in rows}
        if any(r.extras or r.alone or r.card.invocation_tokens is not None for r in residents):
            return Eager.EXTRAS
        buckets = self._buckets
        if any(row.cached is not None for row in rows):
            buckets = self._decodes
            if not buckets or any(row.cached is None or row.sequence.num_tokens > 1 for row in rows):
                return Eager.CACHED
        if (bucket := next((bucket for bucket in buckets if bucket.holds(rows)), None)) is None:
            return Eager.SIZE
        variant = self._lookup(_key(bucket, self._needed(residents)))
        return Eager.VARIANT if variant is None else (bucket, variant)

    def _needed(self, residents: set[Resident]) -> Variant:
        if self._needs_version != self._slots.version:
            self._needs_version = self._slots.version
            self._needs.clear()
        slots = frozenset(r.slot for r in residents if r.slot != BASE_SLOT)
        if slots not in self._needs:
            if len(self._needs) >= _MOST_NEEDS:
                self._needs.clear()
            self._needs[slots] = self._variant([*slots])
        return self._needs[slots]

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

    def _lookup(self, key: GraphKey) -> Variant | None:
        """The smallest captured variant that covers the one of `key`."""
        if key not in self._found:
            same = [known.variant for known in self._graphs if replace(known, variant=key.variant) == key]
            covering = [variant for variant in same if variant.covers(key.variant)]
            self._found[key] = min(covering, key=lambda v: (len(v.groups), v.rank), default=None)
        return self._found[key]

    def _wanted(self) -> list[Variant]:
        ready = np.flatnonzero(self._slots.group_rank.any(axis=1))
        counted = Counter(self._variant([int(slot)]) for slot in ready)
        together = self._variant(ready)
        everything = Variant(self._token_groups, max(together.rank, _USUAL_RANK))
        return list(dict.fromkeys([NO_LORA, *(v for v, _ in counted.most_common()), together, everything]))

    def _has(self, bucket: Bucket, variant: Variant) -> bool:
        """Whether there is this graph, or it can be captured."""
        return _key(bucket, variant) in self._graphs or self._add(bucket, variant)

    def _add(self, bucket: Bucket, variant: Variant) -> bool:
        """Capture one graph; False where that is impossible, or more than the memory there is for graphs."""
        before = self._capture.reserved_bytes()
        forward = self._forward_of(bucket, variant)
        try:
            with torch.inference_mode():
                captured = self._capture.capture(forward)
        except RuntimeError as error:
            reason = str(error).strip().split("\n", 1)[0]
            what = "that continue sequences " if bucket.decodes is not None else ""
            logger.warning("%d tokens %scannot be captured and run eagerly: %s", bucket.num_tokens, what, reason)
            return False
        grown = max(0, self._capture.reserved_bytes() - before)
        if self.stats.num_bytes + grown > self._settings.num_bytes:
            logger.warning("%d MiB for graphs are used up; other batches run eagerly", self._settings.num_bytes >> 20)
            return False
        self.stats.num_bytes += grown
        self._graphs[_key(bucket, variant)] = captured
        self.stats.captured = len(self._graphs)
        self._found.clear()
        return True

    def _forward_of(self, bucket: Bucket, variant: Variant) -> Forward:
        """A call of the backbone that reads the bucket's tensors alone."""
        plan = self._static_plan(bucket, variant)
        if variant.groups:
            self._lora.prepare(plan)

        def forward() -> torch.Tensor:
            step = StaticStep(bucket.batch, self._slots, self._lora, plan, bucket.decodes, self._capture.beside)
            return run_backbone(self.inputs.module, self.inputs.arguments(bucket.batch), step)[0]

        return forward

    def _static_plan(self, bucket: Bucket, variant: Variant) -> LoraPlan:
        if not variant.groups:
            return LoraPlan(bucket.num_tokens, (), self._slots)
        tiles = bucket.tiles_for(variant.rank, self._lora.tile_rows_for(bucket.num_tokens))
        plan = tiles.static_plan(self._slots, bucket.num_tokens)
        plan.cache.update({("active", g.index): () for g in self._slots.groups if g.index not in variant.groups})
        plan.cache["touched"] = [g.index in variant.groups for g in self._slots.groups]
        return plan


def _key(bucket: Bucket, variant: Variant) -> GraphKey:
    return GraphKey(bucket.num_tokens, variant, continues=bucket.decodes is not None)
