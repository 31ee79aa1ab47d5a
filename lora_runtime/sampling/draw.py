"""The draw of one token per row by inverse CDF, the same bit for bit whatever else is in the batch.

Floating-point sums depend on how a kernel splits them, which depends on the batch. So probabilities become integers,
`floor(p * 2**46)`, held in floating point: their sums are below 2**53 and thus exact in fp64 in any order. What is
lost is a token of a probability below 2**-46.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_SCALE = 2.0**46
_BLOCK = 256  # tokens whose weights are summed first, so that only one block per row is scanned
_FIRST_CANDIDATES = 64
_GROWTH = 16


class Limits(NamedTuple):
    """What is kept of each row's distribution (see SamplingParams), [rows] each: fp64, top_k int64."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def of(self, rows: Tensor) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def integer_weights(scores: Tensor) -> Tensor:
    """`floor(softmax(scores) * 2**46)`, [rows, vocab] fp32 whole numbers."""
    return torch.softmax(scores, -1).mul_(_SCALE).floor_()


def draw_from_all(weights: Tensor, min_p: Tensor | None, uniform: Tensor) -> Tensor:
    """A token per row from all that `min_p` leaves, in the order of their ids. `weights` may change. → [rows] int64"""
    if min_p is not None:
        least = (min_p * weights.amax(-1)).float()
        weights = weights.masked_fill_(weights < least[:, None], 0)
    spare = -weights.shape[1] % _BLOCK
    blocks = (pad(weights, (0, spare)) if spare else weights).view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [rows, blocks]
    target = _target(uniform, ends[:, -1])
    block = _first_above(ends, target)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double().cumsum(-1)  # [rows, _BLOCK]
    return block * _BLOCK + _first_above(inside, target - before)


def draw_from_best(scores: Tensor, weights: Tensor, limits: Limits, uniform: Tensor) -> Tensor:
    """A token per row from the best that `limits` leave, in the order of their rank. → [rows] int64

    Ranks are by score, then by id, as far down as a row's limits reach: a few candidates are ranked first, and more
    of the rows that need them. A row's result does not depend on where it stopped. Rows with no finite best score
    get an undefined token.
    """
    tokens = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    by_k_alone = bool((limits.top_k > 0).all())  # their totals are those of the candidates
    totals = uniform if by_k_alone else weights.sum(-1, dtype=torch.float64)
    pending = torch.arange(len(scores), device=scores.device)
    for width in _widths(int(limits.top_k.max()), scores.shape[1]):
        whole = len(pending) == len(scores)
        values, ids = ranked(scores if whole else scores[pending], width)
        mass = (weights if whole else weights[pending]).gather(1, ids).double().cumsum(1)  # [pending, width]
        num_kept, known = _num_kept(values, mass, totals[pending], limits.of(pending), width == scores.shape[1])
        target = _target(uniform[pending], _at(mass, num_kept - 1))
        rank = _first_above(mass, target)
        tokens[pending[known]] = _at(ids, rank)[known]
        pending = pending[~known]
        if not len(pending):
            break
    return tokens


def ranked(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` best scores of each row and their ids, best first, of equals the lower id first.

    Which of those that equal the last get in is undefined unless `width` is the vocabulary.
    """
    if width == scores.shape[1]:
        values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
        return values, ids
    ids = torch.topk(scores, width, sorted=False).indices.sort(-1).values
    values, order = torch.sort(scores.gather(1, ids), dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _widths(max_top_k: int, vocab_size: int) -> Iterator[int]:
    first = max(_FIRST_CANDIDATES, 1 << max_top_k.bit_length())
    for width in (first, first * _GROWTH):
        if width < vocab_size // 2:
            yield width
    yield vocab_size


def _num_kept(values: Tensor, mass: Tensor, totals: Tensor, limits: Limits, is_all: bool) -> tuple[Tensor, Tensor]:
    """How many of the best a row's limits keep, and whether that is sure with these candidates. [rows] each"""
    width = values.shape[1]
    last = values[:, -1:]
    num_sure = (values > last).sum(1)  # every token this good is among the candidates
    num_sure = torch.where((last[:, 0] == -torch.inf) | ~values[:, 0].isfinite() | is_all, width, num_sure)
    by_k = limits.top_k > 0
    kth = _at(values, limits.top_k.clamp(1, width) - 1)
    num_k = torch.where(by_k, (values >= kth[:, None]).sum(1).clamp(min=1), width)
    total = torch.where(by_k, _at(mass, num_k - 1), totals)
    num_before = (mass < (limits.top_p * total)[:, None]).sum(1) + 1  # one more reaches top_p
    num_p = torch.where(limits.top_p < 1, num_before, width)
    weights = mass.diff(dim=1, prepend=torch.zeros_like(mass[:, :1]))
    num_m = (weights >= limits.min_p[:, None] * weights[:, :1]).sum(1)
    num_kept = torch.stack([num_k, num_p, num_m]).amin(0).clamp(min=1)
    return num_kept, (num_kept <= num_sure) & (~by_k | (num_k <= num_sure))


def _at(values: Tensor, places: Tensor) -> Tensor:
    """`values[row, places[row]]` of each row."""
    return values.gather(1, places[:, None])[:, 0]


def _target(uniform: Tensor, total: Tensor) -> Tensor:
    """A whole number in [0, total)."""
    return torch.minimum((uniform * total).floor(), total - 1)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """The first place whose sum exceeds the target, so one of positive weight. [rows, n], [rows] → [rows]"""
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0].clamp(max=sums.shape[1] - 1)
