"""What an adapter changes at a module beside LoRA, on the host: the mathematics of DoRA, biases and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_runtime.adapters.base_spec import BaseSpec, LeafKind
from lora_runtime.adapters.header import Array, TensorRef
from lora_runtime.adapters.keys import Part
from lora_runtime.adapters.low_rank import LowRank, column_norms, row_norms
from lora_runtime.adapters.modules import ModulePlan
from lora_runtime.errors import AdapterRejected

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Read = Callable[[TensorRef], Array]


@dataclass(frozen=True, slots=True)
class ModuleExtras:
    """A linear module: `y = gain * y + shift`, after its delta. An embedding: the row of a token is
    `gain * (table[id] + embed_a[id] @ embed_b)`, the rows of `row_ids` taken from `rows`. Any: `params` replace.
    """

    params: dict[str, Array] = field(default_factory=dict[str, Array])
    gain: Array | None = None  # [d_out]
    shift: Array | None = None  # [d_out]
    embed_a: Array | None = None  # [rows of the table, rank]
    embed_b: Array | None = None  # [rank, d], scaling and embed_scale multiplied in
    row_ids: IntArray | None = None  # [k] ascending
    rows: Array | None = None  # [k, d], of an embedding embed_scale multiplied in

    @property
    def blocks(self) -> dict[str, Array]:
        """The float arrays beside `params`, by name."""
        named = {name: getattr(self, name) for name in ("gain", "shift", "embed_a", "embed_b", "rows")}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def size(self) -> int:
        """Elements."""
        return sum(array.size for array in (*self.params.values(), *self.blocks.values()))


def make_extras(
    plan: ModulePlan, low_rank: LowRank | None, copy: Array | None, base: BaseSpec, read: Read
) -> ModuleExtras | None:
    """The extras of a module, None without any. `copy` is a weight in place of the base's."""
    params = {name: read(ref) for name, ref in plan.params.items()}
    if copy is not None:
        params["weight"] = copy
    if Part.TOKENS in plan.parts:
        return _tokens(plan, params, read)
    if plan.leaf is not None and plan.leaf.kind is LeafKind.EMBEDDING:
        return _embedding(plan, params, base, read) if plan.rank is not None else _present(ModuleExtras(params))
    return _linear(plan, params, low_rank, base, read)


def _present(extras: ModuleExtras) -> ModuleExtras | None:
    return extras if extras.params or extras.blocks else None


def _tokens(plan: ModulePlan, params: dict[str, Array], read: Read) -> ModuleExtras:
    assert plan.leaf is not None
    ids = np.array(plan.token_ids, np.int64)
    order = np.argsort(ids)
    rows = read(plan.parts[Part.TOKENS])[order] * np.float32(plan.leaf.embed_scale)
    return ModuleExtras(params, row_ids=ids[order], rows=rows)


def _embedding(plan: ModulePlan, params: dict[str, Array], base: BaseSpec, read: Read) -> ModuleExtras:
    """PEFT keeps A [rank, rows] and B [d, rank]; DoRA's norm is over the rows of each column."""
    assert plan.leaf is not None
    a = np.ascontiguousarray(read(plan.parts[Part.EMBED_A]).T)  # [rows, rank]
    b = np.float32(plan.scaling) * read(plan.parts[Part.EMBED_B]).T  # [rank, d]
    gain = None
    if Part.MAGNITUDE in plan.parts:
        table = params["weight"] if "weight" in params else base.weight(plan.name)
        gain = _gain(plan, column_norms(table, a, b), read)
    return ModuleExtras(params, gain=gain, embed_a=a, embed_b=b * np.float32(plan.leaf.embed_scale))


def _linear(
    plan: ModulePlan, params: dict[str, Array], low_rank: LowRank | None, base: BaseSpec, read: Read
) -> ModuleExtras | None:
    gain = shift = None
    if Part.MAGNITUDE in plan.parts:
        assert low_rank is not None
        gain = _gain(plan, row_norms(_weight(plan, params, base), low_rank), read)
    if "shift" in plan.extras:
        shift = _shift(plan, gain, base, read)
    return _present(ModuleExtras(params, gain=gain, shift=shift))


def _weight(plan: ModulePlan, params: dict[str, Array], base: BaseSpec) -> Array:
    """The effective weight of a linear module, [d_out, d_in]."""
    own = params.get("weight")
    if own is None:
        return base.weight(plan.name)
    return own.T if plan.leaf is not None and plan.leaf.transposed else own


def _gain(plan: ModulePlan, norms: Array, read: Read) -> Array:
    """DoRA's magnitude over norm (Liu et al. 2024, arXiv:2402.09353)."""
    ref = plan.parts[Part.MAGNITUDE]
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = read(ref) / norms
    if not np.isfinite(gain).all():
        raise AdapterRejected("NOT_FINITE", ref.where, "is over a norm of zero: the adapted weight has a row of zeros")
    return gain


def _shift(plan: ModulePlan, gain: Array | None, base: BaseSpec, read: Read) -> Array:
    """So that `gain * (W x + b + delta) + shift` is PEFT's `gain * (W x + delta) + b_new`, its own bias scaled."""
    old = base.bias(plan.name)
    new = old if plan.bias is None else read(plan.bias)
    assert plan.leaf is not None
    shift = np.zeros(_num_outputs(plan), np.float32)
    if new is not None:
        shift += new
    if old is not None:
        shift -= old if gain is None else gain * old
    if Part.B_BIAS in plan.parts:  # never with DoRA
        shift += np.float32(plan.scaling) * read(plan.parts[Part.B_BIAS])
    return shift


def _num_outputs(plan: ModulePlan) -> int:
    if plan.site is not None:
        return plan.site.d_out
    assert plan.leaf is not None
    return plan.leaf.shapes["weight"][-1 if plan.leaf.transposed else 0]
