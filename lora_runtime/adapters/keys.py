"""Keys of an adapter's tensors: which module of the task class each belongs to, and what of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.header import TensorRef

KEY_PREFIX = "base_model.model."


class Part(StrEnum):
    """What PEFT saves of a module; the values are how its keys end."""

    A = "lora_A.weight"
    B = "lora_B.weight"
    B_BIAS = "lora_B.bias"
    EMBED_A = "lora_embedding_A"
    EMBED_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    DIAGONAL = "lora_diag"
    TOKENS = "token_adapter.trainable_tokens_delta"
    BASE_WEIGHT = "base_layer.weight"  # a copy of the adapted module's own
    BASE_BIAS = "base_layer.bias"


LOW_RANK = frozenset({Part.A, Part.B, Part.EMBED_A, Part.EMBED_B})
_ENDINGS = {part.value: part for part in Part} | {
    "lora_magnitude_vector.weight": Part.MAGNITUDE,
    "token_adapter.base_layer.weight": Part.BASE_WEIGHT,
}
# State of training, and what bias="all" saves of a wrapped head a second and third time.
_UNUSED = re.compile(
    r".+\.(lora_velora_embed|lora_monteclora_sampler\.[a-z_]+|original_module\.[\w.]+|modules_to_save\.[\w.]+"
    r"|token_adapter\.trainable_tokens_original)"
)
_WITH_ADAPTER_NAME = re.compile(r".+\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.[^.]+(\.weight|\.bias)?")


@dataclass(slots=True)
class ModuleKeys:
    """The tensors of one module, by its path in the task class."""

    path: str
    parts: dict[Part, TensorRef] = field(default_factory=dict[Part, TensorRef])
    params: dict[str, TensorRef] = field(default_factory=dict[str, TensorRef])  # saved whole, by parameter name

    @property
    def is_adapted(self) -> bool:
        return not LOW_RANK.isdisjoint(self.parts)


@dataclass(frozen=True, slots=True)
class SortedKeys:
    """All tensors by module, and those that change nothing at inference."""

    modules: dict[str, ModuleKeys]
    unused: tuple[str, ...]


def sort_keys(tensors: Iterable[TensorRef], findings: Findings) -> SortedKeys:
    """Understand every key; raises AdapterRejected for one that PEFT does not write."""
    modules: dict[str, ModuleKeys] = {}
    unused: list[str] = []
    for ref in tensors:
        if _UNUSED.fullmatch(ref.key):
            unused.append(ref.key)
            continue
        with findings.attempt():
            unused += _sort_key(ref, modules)
    return SortedKeys(modules, tuple(unused))


def _sort_key(ref: TensorRef, modules: dict[str, ModuleKeys]) -> tuple[str, ...]:
    """Put a tensor into its module; the keys that say a second time what another says."""
    if not ref.key.startswith(KEY_PREFIX):
        ref.refuse("UNEXPECTED_TENSOR", f"does not start with {KEY_PREFIX!r}; save the adapter with PEFT")
    path = ref.key.removeprefix(KEY_PREFIX)
    module, part = _split(path)
    if part is None:
        if _WITH_ADAPTER_NAME.fullmatch(path):
            ref.refuse("UNEXPECTED_TENSOR", "has an adapter's name in its key; save it with PEFT's save_pretrained")
        module, _, name = path.rpartition(".")
        modules.setdefault(module, ModuleKeys(module)).params[name] = ref
        return ()
    parts = modules.setdefault(module, ModuleKeys(module)).parts
    other = parts.setdefault(part, ref)
    if other is ref:
        return ()
    if part is not Part.MAGNITUDE or other.shape != ref.shape:  # PEFT saves that of a saved embedding by both names
        ref.refuse("DUPLICATE_TENSOR", f"says what {other.key} says")
    return (ref.key,)


def _split(path: str) -> tuple[str, Part | None]:
    """(module, part) by the longest ending that PEFT writes; no part of PEFT's: the path itself."""
    pieces = path.split(".")
    for length in (3, 2, 1):
        part = _ENDINGS.get(".".join(pieces[-length:]))
        if part is not None and len(pieces) > length:
            return ".".join(pieces[:-length]), part
    return path, None


class Locator:
    """Paths in the task class → paths inside the served backbone, whichever class the adapter was trained on."""

    def __init__(self, base: BaseSpec) -> None:
        self._base = base
        self.sites = {site.name: site for site in base.sites}

    def knows(self, name: str) -> bool:
        """Whether the base has a module there."""
        return name in self._base.modules or name in self._base.leaves or name in self.sites

    def locate(self, path: str) -> str:
        """The module's path inside the backbone; of a module outside it, that inside the task class."""
        return path if self.knows(path) else self._base.strip(path)
