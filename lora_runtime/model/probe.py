"""Proof at load: sequences run together must equal the same sequences run apart by the unmodified base.

Some architectures accept our attention function and ignore it; they would attend from one request to another. So
the function's calls are counted, and outputs compared, before a base serves anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_runtime.arena import ALIGNMENT, RankArena, SlotTable
from lora_runtime.batch import BASE_CARD, Batch, Resident, Row, Step
from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.heads import TaskHead
from lora_runtime.heads.task_head import head_logits
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.model.attention import PACKED_ATTENTION
from lora_runtime.model.base import ForwardInputs, PackedBackbone, PaddedBackbone
from lora_runtime.model.observe import PROBE_BATCH, PROBE_TOKENS
from lora_runtime.model.placement import MOVED_TOLERANCES, Placement
from lora_runtime.model.skeleton import Skeleton
from lora_runtime.types import SiteGroup, Task, TokenSequence

PROBE_TOLERANCE = 1e-5  # of the largest hidden value, fp32
_SHORT = slice(None, None, 2)  # of the probe sequences: the one beyond a sliding window is for attention alone


@dataclass(frozen=True, slots=True)
class SeparateOutputs:
    """What the unmodified base answers to each probe sequence alone, by its own attention and positions."""

    hidden: tuple[torch.Tensor, ...]  # [n, d] each
    logits: dict[Task, tuple[torch.Tensor, ...]]  # by each head as it was drawn, of the short sequences
    ids: tuple[tuple[int, ...], ...]


def separate_outputs(backbone: nn.Module, config: Any, skeletons: list[Skeleton]) -> SeparateOutputs:
    """Run the backbone, and each task class around it, on each probe sequence."""
    ids = _probe_ids(config)
    extra = {"use_cache": False} if takes(backbone, "use_cache") else {}
    hidden = tuple(backbone(input_ids=torch.tensor([i]), **extra).last_hidden_state[0] for i in ids)
    logits = {s.task: tuple(_alone(s, i) for i in ids[_SHORT]) for s in skeletons}
    return SeparateOutputs(hidden, logits, ids)


def _alone(skeleton: Skeleton, ids: tuple[int, ...]) -> torch.Tensor:
    logits = head_logits(skeleton.model(input_ids=torch.tensor([ids])))[0]
    return logits[-1] if skeleton.task is Task.GENERATE else logits


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward has an argument of that name."""
    return argument in inspect.signature(module.forward).parameters


def probe_batch(backbone: nn.Module, device: str = "cpu") -> dict[str, Any]:
    """Two equal sequences, with positions for each, so that every embedding sees a row per token."""
    ids = torch.arange(5, 5 + PROBE_TOKENS, device=device).expand(PROBE_BATCH, -1).contiguous()
    arguments: dict[str, Any] = {"input_ids": ids}
    if takes(backbone, "position_ids"):
        arguments["position_ids"] = torch.arange(PROBE_TOKENS, device=device).expand(PROBE_BATCH, -1).contiguous()
    if takes(backbone, "use_cache"):
        arguments["use_cache"] = False
    return arguments


def prove_backbone(
    backbone: nn.Module, config: Any, groups: tuple[SiteGroup, ...], expected: SeparateOutputs, name: str, *, pack: bool
) -> PackedBackbone | PaddedBackbone:
    """Packed attention where it equals `expected`, else padding where that does; raises BaseModelUnsupported.

    `pack` False leaves out the attempt to pack.
    """
    own_attention = config._attn_implementation  # transformers' only name for it
    failures: list[str] = []
    if pack and takes(backbone, "position_ids"):
        backbone.set_attn_implementation(PACKED_ATTENTION)  # pyright: ignore[reportCallIssue]
        try:
            if (found := _prove(backbone, config, groups, expected, PackedBackbone, failures, count=True)) is not None:
                return found
        except BaseModelUnsupported as error:
            failures.append(error.message)
        backbone.set_attn_implementation(own_attention)  # pyright: ignore[reportCallIssue]
    pad_id = int(getattr(config, "pad_token_id", None) or 0)

    def padded(inputs: ForwardInputs) -> PaddedBackbone:
        return PaddedBackbone(inputs, pad_id)

    if (found := _prove(backbone, config, groups, expected, padded, failures, count=False)) is not None:
        return found
    raise BaseModelUnsupported(
        f"base {name}: sequences run together differ from the same run apart ({'; '.join(failures)}; the limit is "
        f"{PROBE_TOLERANCE:.0e} of the largest hidden value), so requests could see each other; it is not served",
        base=name,
    )


def _prove(
    backbone: nn.Module,
    config: Any,
    groups: tuple[SiteGroup, ...],
    expected: SeparateOutputs,
    make: Callable[[ForwardInputs], PackedBackbone | PaddedBackbone],
    failures: list[str],
    *,
    count: bool,
) -> PackedBackbone | PaddedBackbone | None:
    """The first way of counting positions that is exact; what was wrong with the others goes into `failures`."""
    rows = [Row(TokenSequence(ids, None)) for ids in expected.ids]
    for padding_idx in dict.fromkeys((None, getattr(config, "pad_token_id", None))):
        candidate = make(_inputs(backbone, config, padding_idx))
        steps: list[Step] = []

        def make_step(batch: Batch, steps: list[Step] = steps) -> Step:
            steps.append(probe_step(batch, groups))
            return steps[-1]

        try:
            with torch.inference_mode():
                found = candidate.hidden(rows, make_step)
        except IndexError:  # positions beyond the table: the other way of counting is the right one
            continue
        if count and not _counted(steps[0], config):
            failures.append(f"packed attention ran in {len(steps[0].attention_modules)} of its layers")
            return None
        want = torch.cat(expected.hidden)
        error = float((found - want).abs().max() / want.abs().max())
        if error <= PROBE_TOLERANCE:
            return candidate
        failures.append(f"{'packed' if count else 'padded'}: {error:.1e}")
    return None


def check_moved(
    backbone: PackedBackbone | PaddedBackbone,
    groups: tuple[SiteGroup, ...],
    expected: SeparateOutputs,
    placement: Placement,
    name: str,
) -> None:
    """Raise BaseModelUnsupported unless a proved backbone computes at its place what rounding there explains."""
    rows = [Row(TokenSequence(ids, None)) for ids in expected.ids]
    with torch.inference_mode():
        found = backbone.hidden(rows, lambda batch: probe_step(batch, groups)).float().cpu()
    want = torch.cat(expected.hidden)
    error, limit = float((found - want).norm() / want.norm()), MOVED_TOLERANCES[placement.dtype]
    if not error <= limit:
        raise BaseModelUnsupported(
            f"base {name}: in {placement.dtype} on {placement.device} it computes something else than in float32 on "
            f"the CPU (relative error {error:.1e}, limit {limit}); use another dtype",
            base=name,
        )


def _inputs(backbone: nn.Module, config: Any, padding_idx: int | None) -> ForwardInputs:
    # RoBERTa has one type and GPT-2 would embed types as tokens: neither is to be told any
    types = takes(backbone, "token_type_ids") and int(getattr(config, "type_vocab_size", 0) or 0) > 1
    return ForwardInputs(backbone, types, takes(backbone, "position_ids"), takes(backbone, "use_cache"), padding_idx)


def prove_head(
    head: TaskHead, drawn: dict[str, torch.Tensor], groups: tuple[SiteGroup, ...], expected: SeparateOutputs
) -> None:
    """Raise BaseModelUnsupported unless the head, given `drawn` as an adapter's parameters, gives `expected`."""
    task = head.spec.task
    bringer = Resident(-1, "", BASE_CARD, drawn)
    rows = [Row(TokenSequence(ids, None), bringer, task) for ids in expected.ids[_SHORT]]
    hidden = expected.hidden[_SHORT]
    step = probe_step(Batch.pack(rows), groups)
    try:
        with torch.inference_mode():
            head.probe_first_token(step, hidden)
            pairs = zip(head.run(step, torch.cat(hidden)), expected.logits[task], strict=True)
            errors = [float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs]
    except (AttributeError, TypeError) as error:  # the class reaches into its backbone
        raise BaseModelUnsupported(f"its {task} head needs more than hidden states ({error})") from error
    except RuntimeError:  # shapes that do not even meet
        errors = [float("inf")]
    if not max(errors) <= PROBE_TOLERANCE:
        raise BaseModelUnsupported(
            f"its {task} head gives other logits around given hidden states "
            f"({max(errors):.1e} of the largest, limit {PROBE_TOLERANCE:.0e})"
        )


def probe_step(batch: Batch, groups: tuple[SiteGroup, ...]) -> Step:
    """A step without adapters."""
    slots = SlotTable(sum(len(group.sites) for group in groups), groups, num_slots=1)
    return Step(batch, slots, ReferenceGroupedLora(RankArena(ALIGNMENT * 4)))


def _counted(step: Step, config: Any) -> bool:
    called, layers = len(step.attention_modules), int(config.num_hidden_layers)
    shared = int(getattr(config, "num_hidden_groups", layers) or layers)  # ALBERT runs one layer many times
    return called in (layers, shared)


def num_positions(config: Any) -> int:
    """Tokens of the longest sequence. Beyond its original length a text would change, on a "longrope" base (Phi-3),
    the angles of its whole batch.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # of all layers, or by type of layer
    long = [int(kind["original_max_position_embeddings"]) for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([int(getattr(config, "max_position_embeddings", 0) or 0) or 512, *long])


def _probe_ids(config: Any) -> tuple[tuple[int, ...], ...]:
    """Three sequences of different lengths, one longer than any sliding window."""
    positions = num_positions(config)
    windows = [getattr(config, name, None) for name in ("sliding_window", "local_attention", "window_size")]
    window = max((w for w in windows if isinstance(w, int) and w < positions), default=0)
    lengths = (7, max(2, min(2 * window + 9, positions - 4)), 5)
    generator = torch.Generator().manual_seed(0)
    reserved = min(5, int(config.vocab_size) - 1)  # special tokens lie first in most vocabularies
    return tuple(
        tuple(torch.randint(reserved, int(config.vocab_size), (n,), generator=generator).tolist()) for n in lengths
    )
