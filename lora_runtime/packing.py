"""A batch's integers in one buffer, so that they reach an accelerator in one copy that nothing waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

PAD_SEQUENCE = 64  # tokens of the sequences that fill a layout up: short, for attention is quadratic in them


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The integers of a batch's sequences."""

    lengths: Sequence[int]  # [N]
    ids: Sequence[Sequence[int]]  # [N] of [n]
    types: Sequence[Sequence[int] | None]  # [N] of [n]; None: all 0
    pad_ids: Sequence[int]  # [N]: the id that its adapter pads with, -1: none
    padding_idx: int | None  # positions count from 0, or as the RoBERTa family's from `padding_idx + 1`
    first_positions: Sequence[int] = ()  # [N]: of each sequence's first token, where they count from 0; (): 0


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """Views of one buffer."""

    input_ids: torch.Tensor  # [T] int64
    token_type_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, as the base counts them
    pad_ids: torch.Tensor  # [N] int64
    cu_seqlens: torch.Tensor  # [N+1] int32


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the integers of T tokens in N sequences lie in an int64 buffer [num_elements]."""

    num_tokens: int
    num_sequences: int

    @property
    def num_elements(self) -> int:
        return 3 * self.num_tokens + self.num_sequences + self._ends

    @property
    def _ends(self) -> int:
        return (self.num_sequences + 2) // 2  # N + 1 of int32

    def views(self, buffer: torch.Tensor) -> PackedInputs:
        """The parts of a buffer of this layout."""
        tokens = self.num_tokens
        ids, types, positions, pads, ends = buffer.split([tokens, tokens, tokens, self.num_sequences, self._ends])
        return PackedInputs(ids, types, positions, pads, ends.view(torch.int32)[: self.num_sequences + 1])

    def holds(self, num_tokens: int, num_sequences: int) -> bool:
        """Whether so many fit, with the sequences that fill the rest up."""
        rest = self.num_tokens - num_tokens
        return rest >= 0 and num_sequences + len(_fillers(rest)) <= self.num_sequences

    def fill(self, host: torch.Tensor, found: Unpacked) -> None:
        """Write into `host`. Tokens beyond the batch's are of id 0, in sequences of their own at the end; sequences
        beyond those are empty.
        """
        num_tokens = sum(found.lengths)
        assert self.holds(num_tokens, len(found.lengths)), f"{num_tokens} tokens do not fit {self}"
        views = self.views(host)
        ids = views.input_ids.numpy()
        ids[:num_tokens] = np.fromiter(chain.from_iterable(found.ids), np.int64, num_tokens)
        ids[num_tokens:] = 0
        types = views.token_type_ids.numpy()
        types[:] = 0
        lengths = np.array([*found.lengths, *_fillers(self.num_tokens - num_tokens)], dtype=np.int64)
        ends = lengths.cumsum()
        starts = ends - lengths
        for start, own in zip(starts, found.types, strict=False):
            if own is not None:
                types[start : start + len(own)] = own
        positions = views.position_ids.numpy()
        positions[:] = _positions(ids, starts, lengths, found.padding_idx)
        if any(found.first_positions):
            assert found.padding_idx is None, "only decoders continue sequences, and those count from 0"
            positions[:num_tokens] += np.repeat(np.array(found.first_positions), found.lengths)
        pads = views.pad_ids.numpy()
        pads[: len(found.pad_ids)] = found.pad_ids
        pads[len(found.pad_ids) :] = -1
        cu_seqlens = views.cu_seqlens.numpy()
        cu_seqlens[0] = 0
        cu_seqlens[1 : len(ends) + 1] = ends
        cu_seqlens[len(ends) + 1 :] = self.num_tokens


class InputBuffer:
    """A buffer of a layout on a device whose address stays; what a captured graph reads its batch from."""

    def __init__(self, layout: PackedLayout, device: torch.device) -> None:
        """Filled with tokens of nobody."""
        self.layout = layout
        self.buffer = torch.empty(layout.num_elements, dtype=torch.int64, device=device)
        self.inputs = layout.views(self.buffer)
        self.fill(Unpacked((), (), (), (), None))

    def fill(self, found: Unpacked) -> PackedInputs:
        """Replace the content: one copy in the order of the current stream, without a wait."""
        self.buffer.copy_(_on_host(self.layout, found, self.buffer.device), non_blocking=True)
        return self.inputs


def pack_inputs(found: Unpacked, device: torch.device) -> PackedInputs:
    """The integers on `device`, by one copy of one buffer; on the CPU they are that buffer."""
    layout = PackedLayout(sum(found.lengths), len(found.lengths))
    return layout.views(_on_host(layout, found, device).to(device, non_blocking=True))


def _on_host(layout: PackedLayout, found: Unpacked, device: torch.device) -> torch.Tensor:
    """[num_elements], page-locked where it goes on to an accelerator; torch keeps it until that copy was made."""
    host = torch.empty(layout.num_elements, dtype=torch.int64, pin_memory=device.type == "cuda")
    layout.fill(host, found)
    return host


def _fillers(num_tokens: int) -> list[int]:
    """Lengths of the sequences that so many tokens of padding form."""
    whole, rest = divmod(num_tokens, PAD_SEQUENCE)
    return [PAD_SEQUENCE] * whole + ([rest] if rest else [])


def _positions(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, padding_idx: int | None) -> np.ndarray:
    if padding_idx is None:
        return np.arange(len(ids)) - starts.repeat(lengths)
    counted = ids != padding_idx
    total = counted.cumsum()
    before = (total[starts] - counted[starts]).repeat(lengths)
    return np.where(counted, total - before + padding_idx, padding_idx)
