"""Whether a decoder, run in pieces over the KV cache, computes what it computes at once."""

from __future__ import annotations

import torch

from lora_runtime.batch import CachedRow, Row, Step
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.kv_blocks import KvConfig
from lora_runtime.model.base import PackedBackbone
from lora_runtime.model.kv_cache import KvCache
from lora_runtime.model.paged import PagedLayers
from lora_runtime.model.probe import PROBE_TOLERANCE, SeparateOutputs, probe_step
from lora_runtime.types import SiteGroup, TokenSequence

_BLOCK_TOKENS = 16


def prove_paged(backbone: PackedBackbone, groups: tuple[SiteGroup, ...], expected: SeparateOutputs) -> KvConfig:
    """The shape of the base's keys and values; raises BaseModelUnsupported with the reason where it cannot continue.

    Each of the probe's sequences is computed in two chunks and then token by token, all in the same steps.
    """
    config = _shape(backbone, groups, expected)
    device = torch.device("cpu")
    num_blocks = [-(-len(ids) // _BLOCK_TOKENS) for ids in expected.ids]
    cache = KvCache(config, sum(num_blocks), _BLOCK_TOKENS, torch.float32, device)
    layers = PagedLayers(cache)
    blocks: list[list[int]] = []
    for count in num_blocks:
        first = sum(map(len, blocks))
        blocks.append(list(range(first, first + count)))
    worst = 0.0
    for ends in zip(*(_pieces(len(ids)) for ids in expected.ids), strict=True):
        rows = [
            Row(TokenSequence(ids[start:end], None), cached=CachedRow(start, own))
            for ids, own, (start, end) in zip(expected.ids, blocks, ends, strict=True)
        ]
        with torch.inference_mode():
            found = _run(backbone, rows, groups, layers)
        wanted = [hidden[start:end] for hidden, (start, end) in zip(expected.hidden, ends, strict=True)]
        scale = max(float(hidden.abs().max()) for hidden in expected.hidden)
        worst = max(worst, float((found - torch.cat(wanted)).abs().max()) / scale)
    if not worst <= PROBE_TOLERANCE:
        raise BaseModelUnsupported(
            f"run in pieces over a KV cache it differs from the same run at once ({worst:.1e} of the largest hidden "
            f"value, the limit is {PROBE_TOLERANCE:.0e})"
        )
    return config


def _run(
    backbone: PackedBackbone, rows: list[Row], groups: tuple[SiteGroup, ...], layers: PagedLayers | None
) -> torch.Tensor:
    return backbone.hidden(rows, lambda batch: _with_cache(probe_step(batch, groups), rows, layers))


def _with_cache(step: Step, rows: list[Row], layers: PagedLayers | None) -> Step:
    step.paged = None if layers is None else layers.step(rows)
    return step


def _shape(backbone: PackedBackbone, groups: tuple[SiteGroup, ...], expected: SeparateOutputs) -> KvConfig:
    steps: list[Step] = []

    def keep(step: Step) -> Step:
        steps.append(step)
        return step

    rows = [Row(TokenSequence(expected.ids[0], None))]
    with torch.inference_mode():
        backbone.hidden(rows, lambda batch: keep(probe_step(batch, groups)))
    shapes = sorted(set(steps[0].attention_modules.values()))
    if len(shapes) != 1 or shapes[0][1] != shapes[0][2]:
        told = ", ".join(f"{heads} of {key} and {value}" for heads, key, value in shapes)
        raise BaseModelUnsupported(f"its layers have keys and values of different shapes (KV heads: {told})")
    return KvConfig(len(steps[0].attention_modules), shapes[0][0], shapes[0][1], itemsize=4)


def _pieces(length: int) -> list[tuple[int, int]]:
    """Two chunks and two single tokens of a sequence of at least 4."""
    half = max(1, (length - 2) // 2)
    return [(0, half), (half, length - 2), (length - 2, length - 1), (length - 1, length)]
