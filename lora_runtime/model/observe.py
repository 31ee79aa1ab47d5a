"""What a base does, found by watching it: which of its modules run, on what, and which share an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_runtime.adapters.base_spec import LeafKind
from lora_runtime.heads.sequence_leaf import is_leaf

# Two equal sequences: rows of tokens, of sequences and of neither differ in shape. No base has 13 heads; some have 9,
# and norm [N, heads, L, d].
PROBE_BATCH, PROBE_TOKENS = 2, 13


class Rows(Enum):
    """What the rows of a module's input are."""

    TOKENS = auto()  # [N, L, ...]: each row a token of its sequence
    SEQUENCES = auto()  # [N, d]: a pooler
    SHARED = auto()  # anything else: computed once for all sequences (DeBERTa's relative positions)


@dataclass(slots=True)
class Observed:
    """One leaf of the backbone; `number` is that of its first input of tokens, None where it saw none."""

    path: str
    module: nn.Module
    kind: LeafKind
    rows: set[Rows]  # of all its inputs
    number: int | None = None

    @property
    def per_token(self) -> bool:
        return Rows.SEQUENCES not in self.rows


def kind_of(module: nn.Module) -> LeafKind:
    """Linear and Conv1D take LoRA as a matrix does; embeddings as a table; the rest can only be replaced."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return LeafKind.LINEAR
    plain = isinstance(module, nn.Embedding) and (
        type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")  # Gemma multiplies its rows
    )
    return LeafKind.EMBEDDING if plain else LeafKind.OTHER


def widths(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear module."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def observe(backbone: nn.Module, forward: Callable[[], object]) -> dict[str, Observed]:
    """Run `forward` on [PROBE_BATCH, PROBE_TOKENS] tokens; the leaves that ran on one tensor, in call order."""
    seen: dict[str, Observed] = {}
    inputs: list[torch.Tensor] = []  # kept alive, so that `is` tells inputs apart

    def note(path: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if not args or not isinstance(args[0], torch.Tensor):
                return
            if any(isinstance(value, torch.Tensor) for value in (*args[1:], *kwargs.values())):
                return  # an adapter's rows of the input alone are not all that it computes from
            x = args[0]
            leaf = seen.setdefault(path, Observed(path, module, kind_of(module), set()))
            rows = _rows_of(x)
            leaf.rows.add(rows)
            if rows is Rows.TOKENS and leaf.number is None:
                known = (number for number, seen_input in enumerate(inputs) if seen_input is x)
                leaf.number = next(known, len(inputs))
                if leaf.number == len(inputs):
                    inputs.append(x)

        return hook

    leaves = [(path, module) for path, module in backbone.named_modules() if is_leaf(module)]
    handles = [module.register_forward_pre_hook(note(path), with_kwargs=True) for path, module in leaves]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rows_of(x: torch.Tensor) -> Rows:
    if tuple(x.shape[:2]) == (PROBE_BATCH, PROBE_TOKENS):
        return Rows.TOKENS
    return Rows.SEQUENCES if x.dim() == 2 and x.shape[0] == PROBE_BATCH else Rows.SHARED
