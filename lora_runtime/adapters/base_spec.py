"""What an adapter is validated against: the served base, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from lora_runtime.adapters.metadata import BaseFingerprint
from lora_runtime.types import Site, SiteGroup, Task

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The parameters of one task's head around the backbone.

    `shapes` has every parameter of the head's layers, None standing for the number of labels. Those in
    `from_base` are in the base checkpoint (BERT's pooler); an adapter may replace them. The others it must bring.
    `fixed` are parameters outside its layers, which an adapter cannot replace. `output` is the parameter whose
    rows are the labels; empty for a task without a head of its own (EMBED).
    """

    task: Task
    shapes: dict[str, tuple[int | None, ...]]
    from_base: frozenset[str]
    fixed: frozenset[str]
    output: str
    num_outputs: int | None = None  # rows `output` must have (2 for ANSWER); None: one for each label


class LeafKind(StrEnum):
    """What a parametrised module without children is."""

    LINEAR = "linear"  # nn.Linear or Conv1D: LoRA, DoRA, biases, replacement
    EMBEDDING = "embedding"  # nn.Embedding: LoRA, DoRA, replaced rows, replacement
    OTHER = "other"  # a norm and the like, which computes each token from that token alone: replacement


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module of the base that an adapter may change, by its path inside the backbone (or the head)."""

    path: str
    kind: LeafKind
    shapes: dict[str, tuple[int, ...]]  # of its parameters, as its checkpoint has them
    transposed: bool = False  # Conv1D: weight is [d_in, d_out]
    embed_scale: float = 1.0  # what an embedding multiplies its rows by (Gemma)
    per_sequence: bool = False  # runs in the head stage: a pooler, or lm_head


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The served base: its sites by module path, its heads, its content.

    Paths are those inside the backbone; of modules outside it, those inside the task class. `parameter(path)` reads
    `parameters`, views of the resident weights on the host: never to be written.
    """

    name: str
    prefixes: tuple[str, ...]  # of the backbone inside the task classes: "bert"; "model" and "transformer" for Llama
    sites: tuple[Site, ...]
    groups: tuple[SiteGroup, ...]
    heads: dict[Task, HeadSpec]
    fingerprint: BaseFingerprint
    max_length: int  # tokens
    modules: frozenset[str]  # every module path of the backbone
    leaves: Mapping[str, Leaf] = field(default_factory=dict[str, Leaf])
    parameters: Mapping[str, Array] = field(default_factory=dict[str, Array])
    is_decoder: bool = False
    word_embedding: str = ""  # path of the leaf that embeds input ids
    tied_output: bool = False  # lm_head's weight is the word embedding's
    tokenizer_digest: str = ""  # see `adapters/tokenizer.py`
    chat_template: str | None = None  # of its tokenizer
    eos_token: str | None = None  # of its tokenizer
    pad_token_id: int | None = None
    shared_modules: frozenset[str] = frozenset()  # run once for all sequences of a batch (relative positions)
    unserved: Mapping[Task, str] = field(default_factory=dict[Task, str])  # tasks without a head, and why

    @property
    def num_token_ids(self) -> int | None:
        """Rows of the word embedding, None where it is not known which module that is."""
        leaf = self.leaves.get(self.word_embedding)
        return None if leaf is None else leaf.shapes["weight"][0]

    def site(self, name: str) -> Site | None:
        return next((site for site in self.sites if site.name == name), None)

    def strip(self, path: str) -> str:
        """A module or parameter path of a task class, without the backbone's prefix."""
        for prefix in self.prefixes:
            if path.startswith(f"{prefix}."):
                return path[len(prefix) + 1 :]
        return path

    def weight(self, path: str) -> Array:
        """The weight of a linear leaf, [d_out, d_in], or of an embedding, [rows, d]."""
        weight = self.parameters[f"{path}.weight"]
        return weight.T if self.leaves[path].transposed else weight

    def bias(self, path: str) -> Array | None:
        """The bias of a leaf, None where it has none."""
        return self.parameters.get(f"{path}.bias")
