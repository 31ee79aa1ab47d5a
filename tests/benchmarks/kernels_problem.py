"""What the kernel benchmark computes: modules of known models, batches of many adapters, and the exact answer."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from lora_runtime.arena import ALayout, RankArena, SitePlacement, SlotTable, align
from lora_runtime.kernels.grouped_lora import LoraPlan, grouped_lora
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.kernels.grouped_lora.registry import choose_backend
from lora_runtime.types import Site, SiteGroup

MIXED_RANKS = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Shape:
    """Linears fed by one input."""

    name: str
    d_in: int
    d_outs: tuple[int, ...]


SHAPES = {
    "minilm": (
        Shape("MiniLM q, v", 384, (384, 384)),
        Shape("MiniLM up", 384, (1536,)),
        Shape("MiniLM down", 1536, (384,)),
    ),
    "bert": (Shape("BERT-base q, v", 768, (768, 768)), Shape("BERT-base up", 768, (3072,))),
    "gpt2": (Shape("GPT-2 qkv", 768, (2304,)),),
    "llama-1b": (Shape("Llama-1B q, v", 2048, (2048, 512)), Shape("Llama-1B gate, up", 2048, (8192, 8192))),
    "llama-7b": (Shape("Llama-7B q, v", 4096, (4096, 4096)),),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One batch: as many segments as adapters, of `lengths` rows each, in batch order."""

    shape: Shape
    kind: str  # "packed", "ragged" or "decode"
    lengths: tuple[int, ...]
    ranks: tuple[int, ...]  # of the adapters, not in batch order

    @classmethod
    def packed(cls, shape: Shape, num_tokens: int, num_adapters: int, ranks: Iterable[int]) -> Case:
        """Segments of equal length: what padded contenders like best."""
        assert num_tokens % num_adapters == 0, f"{num_tokens} tokens do not divide among {num_adapters} adapters"
        kind = "decode" if num_tokens == num_adapters else "packed"
        return cls(shape, kind, (num_tokens // num_adapters,) * num_adapters, _cycled(ranks, num_adapters))

    @classmethod
    def ragged(cls, shape: Shape, num_tokens: int, num_adapters: int, ranks: Iterable[int]) -> Case:
        """Segments of unequal length, at least one row each."""
        draw = random.Random(num_tokens * num_adapters)
        cuts = sorted(draw.sample(range(1, num_tokens), num_adapters - 1))
        lengths = tuple(b - a for a, b in zip([0, *cuts], [*cuts, num_tokens], strict=True))
        return cls(shape, "ragged", lengths, _cycled(ranks, num_adapters))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_adapters(self) -> int:
        return len(self.lengths)

    @property
    def ranks_text(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        return f"rank {low}" if low == high else f"ranks {low} to {high}"

    @property
    def name(self) -> str:
        adapters = f"{self.num_adapters} adapter{'s' if self.num_adapters > 1 else ''}"
        kind = "" if self.kind == "packed" else f" ({self.kind})"
        return f"{self.shape.name}, {self.num_tokens} tokens, {adapters}{kind}, {self.ranks_text}"


def cases_of(shape: Shape, *, quick: bool = False) -> list[Case]:
    """The batches measured on one module; `quick`: four that differ most."""
    if quick:
        return [
            Case.packed(shape, 64, 1, (16,)),
            Case.packed(shape, 256, 32, (16,)),
            Case.ragged(shape, 256, 32, MIXED_RANKS),
            Case.packed(shape, 32, 32, (16,)),
        ]
    counts = {64: (1, 8, 32), 256: (1, 8, 32, 64), 2048: (1, 8, 32, 64), 32: (32,)}
    cases = [Case.packed(shape, tokens, n, (16,)) for tokens, adapters in counts.items() for n in adapters]
    cases += [Case.packed(shape, tokens, 32, r) for tokens in (256, 2048, 32) for r in ((8,), MIXED_RANKS)]
    return [*cases, Case.ragged(shape, 256, 32, MIXED_RANKS)]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter's matrices at every site of the module."""

    a: tuple[torch.Tensor, ...]  # [rank, d_in] per site
    b: tuple[torch.Tensor, ...]  # [rank, d_out] per site
    rank: int
    scaling: float


@dataclass(frozen=True)
class Problem:
    """A case with its tensors. Deltas are about as large as what they are added to, so a wrong one shows."""

    case: Case
    x: torch.Tensor  # [num_tokens, d_in]
    weights: tuple[torch.Tensor, ...]  # [d_out, d_in] per site
    biases: tuple[torch.Tensor, ...]
    adapters: tuple[Adapter, ...]
    order: tuple[int, ...]  # which adapter each segment has
    arena: RankArena
    slots: SlotTable
    group: SiteGroup

    @classmethod
    def make(cls, case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, variance: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, generator=generator) * variance**0.5).to(device, dtype)

        shape = case.shape
        sites = tuple(Site(i, f"site{i}", shape.d_in, d, 0, per_sequence=False) for i, d in enumerate(shape.d_outs))
        group = SiteGroup(0, shape.d_in, sites)
        adapters = tuple(
            Adapter(
                tuple(normal(rank, shape.d_in, variance=1 / shape.d_in) for _ in shape.d_outs),
                tuple(normal(rank, d_out, variance=1 / rank) for d_out in shape.d_outs),
                rank,
                scaling=(0.5, 1.0, 2.0)[i % 3],
            )
            for i, rank in enumerate(case.ranks)
        )
        problem = cls(
            case,
            normal(case.num_tokens, shape.d_in),
            tuple(normal(d_out, shape.d_in, variance=1 / shape.d_in) for d_out in shape.d_outs),
            tuple(normal(d_out) for d_out in shape.d_outs),
            adapters,
            tuple(random.Random(seed).sample(range(len(adapters)), len(adapters))),
            RankArena(sum(_image_elements(adapter) for adapter in adapters) * dtype.itemsize, dtype, str(device)),
            SlotTable(len(sites), (group,), a_layout=choose_backend(device, dtype).a_layout),
            group,
        )
        for adapter in adapters:
            problem._publish(adapter)
        return problem

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def max_rank(self) -> int:
        return max(self.case.ranks)

    @property
    def segments(self) -> list[tuple[Adapter, int, int]]:
        """(adapter, first row, row after the last) in batch order."""
        found: list[tuple[Adapter, int, int]] = []
        for index, length in zip(self.order, self.case.lengths, strict=True):
            start = found[-1][2] if found else 0
            found.append((self.adapters[index], start, start + length))
        return found

    def plan(self) -> LoraPlan:
        return LoraPlan.build(self.slots, list(zip(self.order, self.case.lengths, strict=True)))

    def base(self) -> list[torch.Tensor]:
        """What the sites compute without adapters, [num_tokens, d_out] each."""
        return self.base_of(self.x)

    def base_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [functional.linear(x, w, bias) for w, bias in zip(self.weights, self.biases, strict=True)]

    def exact(self, *, adapted: bool) -> list[torch.Tensor]:
        """In float64, by the reference backend."""
        x, outs = self.x.double(), list[torch.Tensor]()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            outs.append(functional.linear(x, weight.double(), bias.double()))
        if adapted:
            grouped_lora(ReferenceGroupedLora(self.arena), x, self.group, self.plan(), dict(enumerate(outs)))
        return outs

    @cached_property
    def real(self) -> torch.Tensor:
        """Which rows of a padded batch are tokens, [segments, longest]."""
        lengths = torch.tensor(self.case.lengths, device=self.device)
        return torch.arange(max(self.case.lengths), device=self.device)[None, :] < lengths[:, None]

    @cached_property
    def padded_x(self) -> torch.Tensor:
        """[segments, longest, d_in], zeros where there is no token: for contenders whose models run padded."""
        padded = self.x.new_zeros(*self.real.shape, self.case.shape.d_in)
        padded[self.real] = self.x
        return padded

    def unpad(self, out: torch.Tensor) -> torch.Tensor:
        """[segments, longest, d_out] to [num_tokens, d_out]."""
        return out[self.real]

    def stacked_a(self) -> torch.Tensor:
        """[adapters, sites * max_rank, d_in]: every A, with zeros up to the largest rank."""
        sites, rank = len(self.group.sites), self.max_rank
        stack = self.x.new_zeros(len(self.adapters), sites, rank, self.group.d_in)
        for i, adapter in enumerate(self.adapters):
            for site, a in enumerate(adapter.a):
                stack[i, site, : adapter.rank] = a
        return stack.view(len(self.adapters), sites * rank, self.group.d_in)

    def stacked_b(self) -> list[torch.Tensor]:
        """[adapters, max_rank, d_out] per site, scaling multiplied in."""
        stacks = [self.x.new_zeros(len(self.adapters), self.max_rank, d_out) for d_out in self.case.shape.d_outs]
        for i, adapter in enumerate(self.adapters):
            for stack, b in zip(stacks, adapter.b, strict=True):
                stack[i, : adapter.rank] = b * adapter.scaling
        return stacks

    @property
    def least_bytes(self) -> int:
        """Of memory traffic: weights, active adapters, x and outputs once each."""
        rows = self.case.num_tokens * (self.group.d_in + sum(self.case.shape.d_outs))
        matrices = sum(w.numel() for w in self.weights) + sum(_image_elements(adapter) for adapter in self.adapters)
        return (rows + matrices) * self.dtype.itemsize

    def _publish(self, adapter: Adapter) -> None:
        """Lay it out as the runtime does: the A of all sites as one matrix, then every B."""
        run = self.arena.allocate(_image_elements(adapter))
        view, cursor = self.arena.view(run), sum(a.numel() for a in adapter.a)
        ranks = torch.cat(adapter.a)  # [R, d_in]
        view[:cursor] = (ranks.T if self.slots.a_layout is ALayout.RANK_COLUMNS else ranks).flatten()
        places: list[SitePlacement] = []
        for site, b in enumerate(adapter.b):
            cursor = align(cursor)
            view[cursor : cursor + b.numel()] = b.flatten()
            a_offset = self.slots.a_layout.place(site * adapter.rank, self.group.d_in)
            places.append(SitePlacement(site, a_offset, cursor, adapter.rank, adapter.scaling))
            cursor += b.numel()
        self.slots.publish(self.slots.acquire(), run, tuple(places))


def _image_elements(adapter: Adapter) -> int:
    return align(sum(a.numel() for a in adapter.a)) + sum(align(b.numel()) for b in adapter.b)


def _cycled(ranks: Iterable[int], count: int) -> tuple[int, ...]:
    known = tuple(ranks)
    return tuple(known[i % len(known)] for i in range(count))
