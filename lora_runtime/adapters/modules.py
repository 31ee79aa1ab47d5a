"""What an adapter does to each module of the base, planned from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from lora_runtime.adapters.base_spec import BaseSpec, HeadSpec, Leaf, LeafKind
from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.header import TensorRef
from lora_runtime.adapters.keys import KEY_PREFIX, Locator, ModuleKeys, Part
from lora_runtime.adapters.targets import Targets
from lora_runtime.adapters.variants import BD_LORA, KASA, RECOMPUTED, Variant, check_embedding
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import Site, Task

_PAIR = {Part.A: Part.B, Part.B: Part.A, Part.EMBED_A: Part.EMBED_B, Part.EMBED_B: Part.EMBED_A}
_ONLY_WITH = {
    Part.B_BIAS: "lora_bias",
    Part.MAGNITUDE: "use_dora",
    Part.DIAGONAL: "kasa_config",
    Part.TOKENS: "trainable_token_indices",
}


@dataclass(slots=True)
class ModulePlan:
    """One module and its tensors; without a base, only what keys and config say."""

    name: str  # inside the backbone; of a module outside it, inside the task class
    path: str  # inside the task class, as the keys have it
    leaf: Leaf | None = None
    site: Site | None = None
    rank: int | None = None  # as saved
    scaling: float = 1.0
    parts: dict[Part, TensorRef] = field(default_factory=dict[Part, TensorRef])
    params: dict[str, TensorRef] = field(default_factory=dict[str, TensorRef])  # replaced parameters
    copy: TensorRef | None = None  # of the base's weight, as PEFT saves it beside an adapter
    bias: TensorRef | None = None  # replaced bias of a linear module that keeps its weight
    blocks: tuple[int, int] = (1, 1)  # of A and B; 1 is dense
    token_ids: tuple[int, ...] = ()
    residual: bool = False  # the adapter was trained on what an SVD or QR left of the base's weight

    @property
    def table_rows(self) -> int:
        """Rows of the weight that the adapter uses."""
        weight = self.copy or self.params.get("weight")
        if weight is not None:
            return weight.shape[0]
        return self.leaf.shapes["weight"][0] if self.leaf else 0

    @property
    def replaced(self) -> dict[str, TensorRef]:
        """What stands in place of the base's parameters, by name."""
        beside = {"weight": self.copy, "bias": self.bias}
        return self.params | {name: ref for name, ref in beside.items() if ref is not None}

    @property
    def extras(self) -> tuple[str, ...]:
        """What it changes beside LoRA, by the names of ModuleExtras."""
        names = [f"params.{name}" for name, ref in self.replaced.items() if ref is not self.bias]
        if Part.MAGNITUDE in self.parts:
            names.append("gain")
        if self.leaf is not None and self.leaf.kind is LeafKind.LINEAR:
            has_bias = "bias" in self.leaf.shapes and Part.MAGNITUDE in self.parts
            names += ["shift"] * (has_bias or self.bias is not None or Part.B_BIAS in self.parts)
        names += ["embed_a", "embed_b"] * (Part.EMBED_A in self.parts)
        names += ["row_ids", "rows"] * (Part.TOKENS in self.parts)
        return tuple(names)

    @property
    def may_be_base(self) -> bool:
        """Whether the copy may turn out to be the base's own weight, and then is not kept."""
        return self.copy is not None and self.leaf is not None and self.copy.shape == self.leaf.shapes["weight"]

    @property
    def num_image_elements(self) -> int:
        """Elements of its blocks in an image, without alignment and without a copy that may be the base's own."""
        refs = [self.parts.get(part) for part in (Part.EMBED_A, Part.EMBED_B, Part.TOKENS, Part.MAGNITUDE)]
        copy = None if self.may_be_base else self.copy
        total = sum(ref.size for ref in (*refs, *self.params.values(), copy) if ref is not None)
        if self.site is not None and self.rank is not None:
            total += self.rank * (1 + self.residual) * (self.site.d_in + self.site.d_out)
        if self.leaf is not None and "shift" in self.extras:
            total += self.site.d_out if self.site else self.leaf.shapes["bias"][0]
        return total


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans modules of one adapter against one base; `head` parameters are collected on the way."""

    config: LoraConfig
    variants: tuple[Variant, ...]
    base: BaseSpec
    head: HeadSpec
    locator: Locator
    targets: Targets
    findings: Findings
    head_params: dict[str, TensorRef] = field(default_factory=dict[str, TensorRef])
    unused: list[str] = field(default_factory=list[str])

    @property
    def output_path(self) -> str:
        """The path of the layer over the vocabulary; empty for a base without one."""
        head = self.base.heads.get(Task.GENERATE)
        return next((name.rpartition(".")[0] for name in head.shapes if name.endswith(".weight")), "") if head else ""

    def leaf(self, name: str) -> Leaf | None:
        """The leaf there; a site says enough of one that is not described."""
        leaf, site = self.base.leaves.get(name), self.locator.sites.get(name)
        if leaf is None and site is not None:
            shapes = {"weight": (site.d_out, site.d_in)}
            return Leaf(name, LeafKind.LINEAR, shapes, per_sequence=site.per_sequence)
        return leaf

    def is_unused(self, leaf: Leaf) -> bool:
        """Whether the adapter's task never runs the leaf: a pooler or an output layer of another task."""
        names = {f"{leaf.path}.{name}" for name in leaf.shapes}
        return leaf.per_sequence and names.isdisjoint(self.head.shapes.keys() | self.head.fixed)

    def plan(self, keys: ModuleKeys) -> ModulePlan | None:
        """None for a module of the head, or one that the task never runs."""
        name = self.locator.locate(keys.path)
        params = self._without_head(name, keys)
        if not params and not keys.parts:
            return None
        leaf = self.leaf(name)
        if leaf is not None and self.is_unused(leaf):
            self.unused.append(name)
            return None
        plan = ModulePlan(name, keys.path, leaf, parts=dict(keys.parts))
        if keys.is_adapted:
            self._plan_low_rank(plan)
        elif keys.parts:
            self._plan_tokens(plan)
        self._plan_params(plan, params, keys.is_adapted)
        self._check_shapes(plan)
        return plan

    def _without_head(self, name: str, keys: ModuleKeys) -> dict[str, TensorRef]:
        """The parameters that are not the head's; those of the head are checked and kept."""
        rest: dict[str, TensorRef] = {}
        for param, ref in keys.params.items():
            full = f"{name}.{param}" if name else param
            shape = self.head.shapes.get(full) if self.head.output else None
            if shape is None:
                rest[param] = ref
                continue
            fits = len(ref.shape) == len(shape) and all(
                want in (None, got) for want, got in zip(shape, ref.shape, strict=True)
            )
            if not fits:
                wanted = ["labels" if n is None else n for n in shape]
                ref.refuse("SHAPE_MISMATCH", f"has shape {list(ref.shape)}, {wanted} is needed")
            if full in self.head_params:
                ref.refuse("DUPLICATE_TENSOR", "gives a parameter of the head under a second name")
            self.head_params[full] = ref
        return rest

    def _plan_low_rank(self, plan: ModulePlan) -> None:
        kind = LeafKind.EMBEDDING if Part.EMBED_A in plan.parts else LeafKind.LINEAR
        site = self.locator.sites.get(plan.name)
        leaf = plan.leaf
        if leaf is None or leaf.kind is not kind or (kind is LeafKind.LINEAR and site is None):
            self._refuse_module(plan, kind)
        check_pair(plan.parts)
        if Part.A in plan.parts and Part.EMBED_A in plan.parts:
            plan.parts[Part.EMBED_A].refuse("UNEXPECTED_TENSOR", "adapts a module that lora_A adapts too")
        plan.rank = self.config.rank(plan.path)
        plan.scaling = self.config.scaling(plan.path, plan.rank)
        plan.copy = plan.parts.pop(Part.BASE_WEIGHT, None)
        plan.bias = plan.parts.pop(Part.BASE_BIAS, None)
        if kind is LeafKind.EMBEDDING:
            check_embedding(plan.path, self.variants)
        else:
            plan.site = site
            self._plan_variant(plan, leaf)
        check_companions(plan.parts, plan.path, self.config, kasa=KASA in self.variants)

    def _plan_variant(self, plan: ModulePlan, leaf: Leaf) -> None:
        if isinstance(self.config.use_bdlora, bool) or self.config.use_bdlora is None:
            plan.blocks = 1, 1
        else:
            self._refuse_transposed(plan, leaf, BD_LORA)
            plan.blocks = self.config.use_bdlora.blocks(plan.path)
        plan.residual = plan.copy is None and (RECOMPUTED in self.variants or KASA in self.variants)
        if KASA in self.variants:
            self._refuse_transposed(plan, leaf, KASA)
            if plan.rank is not None and plan.rank >= min(leaf.shapes["weight"]):
                plan.parts[Part.A].refuse("SHAPE_MISMATCH", "has a rank that leaves nothing of the base, as KaSA needs")

    def _refuse_transposed(self, plan: ModulePlan, leaf: Leaf, variant: Variant) -> None:
        if leaf.transposed:
            where = f"{CONFIG_FILE} field {variant.field}"
            raise AdapterRejected("VARIANT_CONFLICT", where, f"PEFT has no {variant.name} on a Conv1D ({plan.path})")

    def _plan_tokens(self, plan: ModulePlan) -> None:
        for part, ref in plan.parts.items():
            if Part.TOKENS not in plan.parts or part not in (Part.TOKENS, Part.BASE_WEIGHT):
                ref.refuse("UNEXPECTED_TENSOR", "belongs to LoRA, but the module has no lora_A and lora_B")
        if plan.leaf is None or plan.leaf.kind is LeafKind.OTHER:
            self._refuse_module(plan, LeafKind.EMBEDDING)
        plan.copy = plan.parts.pop(Part.BASE_WEIGHT, None)

    def _plan_params(self, plan: ModulePlan, params: dict[str, TensorRef], adapted: bool) -> None:
        leaf = plan.leaf
        for name, ref in params.items():
            if leaf is None or name not in leaf.shapes:
                self._refuse_param(plan, name, ref)
            if leaf.kind is LeafKind.LINEAR and name == "bias" and "weight" not in params:
                if plan.bias is not None:
                    ref.refuse("DUPLICATE_TENSOR", f"says what {plan.bias.key} says")
                if adapted:
                    self.findings.warn(f"{ref.where} is served as early PEFT wrote it; PEFT 0.6 and later ignores it")
                plan.bias = ref
            elif adapted or plan.parts:
                ref.refuse("UNEXPECTED_TENSOR", "is a weight beside LoRA of the same module; PEFT would not read it")
            elif name == "weight" and self.may_grow(plan.name) and not self.targets.saves(plan.path):
                plan.copy = ref
            else:
                plan.params[name] = ref

    def may_grow(self, name: str) -> bool:
        """Whether the module has a row per token, so that a resized vocabulary gives it more."""
        return name != "" and name in (self.base.word_embedding, self.output_path)

    def _check_shapes(self, plan: ModulePlan) -> None:
        leaf = plan.leaf
        if leaf is None:
            return
        for name, ref in plan.replaced.items():
            want = leaf.shapes.get(name)
            grown = name == "weight" and self.may_grow(plan.name) and ref.shape[1:] == leaf.shapes["weight"][1:]
            if ref.shape != want and not (grown and ref.shape[0] > leaf.shapes["weight"][0]):
                self._refuse_shape(ref, want)
        for part, shape in self._part_shapes(plan, leaf).items():
            ref = plan.parts.get(part)
            if ref is not None and ref.shape != shape:
                self._refuse_shape(ref, shape)

    def _part_shapes(self, plan: ModulePlan, leaf: Leaf) -> dict[Part, tuple[int, ...]]:
        rank = plan.rank or 0
        if leaf.kind is LeafKind.EMBEDDING or plan.rank is None:
            width = leaf.shapes["weight"][-1]
            embedding = {Part.EMBED_A: (rank, plan.table_rows), Part.EMBED_B: (width, rank), Part.MAGNITUDE: (width,)}
            return embedding if plan.rank is not None else {}
        assert plan.site is not None
        d_in, d_out = plan.site.d_in, plan.site.d_out
        in_a, in_b = plan.blocks
        if d_in % in_a or rank % max(in_a, in_b) or d_out % in_b:
            message = f"nblocks does not divide the rank {rank} and the widths {d_in}, {d_out} of {plan.path}"
            raise AdapterRejected("CONFIG_INVALID", f"{CONFIG_FILE} field use_bdlora", message)
        return {
            Part.A: (rank, d_in // in_a),
            Part.B: (d_out, rank // in_b),
            Part.B_BIAS: (d_out,),
            Part.MAGNITUDE: (d_out,),
            Part.DIAGONAL: (rank,),
        }

    def _refuse_shape(self, ref: TensorRef, want: tuple[int, ...] | None) -> NoReturn:
        needed = "none" if want is None else list(want)
        ref.refuse("SHAPE_MISMATCH", f"has shape {list(ref.shape)}, {needed} is needed by the config and the base")

    def _refuse_module(self, plan: ModulePlan, kind: LeafKind) -> NoReturn:
        ref = next(iter(plan.parts.values()))
        where = f"{ref.file} tensor {KEY_PREFIX}{plan.path}"
        if self.locator.knows(plan.name):
            raise AdapterRejected("SITE_UNSUPPORTED", where, f"adapts a module that is not a served {kind}")
        message = f"the base {self.base.name} has no such module; serve the adapter on the base it was trained on"
        raise AdapterRejected("FOREIGN_BASE", where, message)

    def _refuse_param(self, plan: ModulePlan, name: str, ref: TensorRef) -> NoReturn:
        full = f"{plan.name}.{name}" if plan.name else name
        if full in self.head.fixed or (plan.name and self.locator.knows(plan.name)):
            ref.refuse("FEATURE_UNSUPPORTED", "replaces a parameter of the base that is not served per adapter")
        message = f"belongs neither to LoRA nor to the {self.head.task} head of {self.base.name}"
        ref.refuse("UNEXPECTED_TENSOR", message)


def check_pair(parts: Mapping[Part, TensorRef]) -> None:
    """Raise AdapterRejected for A without B, or B without A."""
    for part, other in _PAIR.items():
        if part in parts and other not in parts:
            where = parts[part].where.removesuffix(part.value) + other.value
            raise AdapterRejected("MISSING_TENSOR", where, "is missing; its other half is there")


def check_companions(parts: Mapping[Part, TensorRef], path: str, config: LoraConfig, *, kasa: bool) -> None:
    """Raise AdapterRejected unless exactly the tensors that the config speaks of stand beside A and B."""
    wanted = {Part.EMBED_A, Part.EMBED_B} if Part.EMBED_A in parts else {Part.A, Part.B}
    wanted |= {Part.MAGNITUDE} if config.use_dora else set()
    wanted |= {Part.B_BIAS} if config.lora_bias else set()
    wanted |= {Part.DIAGONAL} if kasa else set()
    for part, ref in parts.items():
        if part not in wanted:
            message = f"is not expected beside LoRA; {CONFIG_FILE} has no {_ONLY_WITH.get(part, part.value)} for it"
            ref.refuse("UNEXPECTED_TENSOR", message)
    for part in sorted(wanted - parts.keys()):
        first = next(iter(parts.values()))
        where = f"{first.file} tensor {KEY_PREFIX}{path}.{part.value}"
        message = f"is missing; field {_ONLY_WITH[part]} of {CONFIG_FILE} promises it"
        raise AdapterRejected("MISSING_TENSOR", where, message)
