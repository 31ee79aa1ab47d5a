"""What an adapter is validated against: the served base, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from lora_runtime.adapters.metadata import BaseFingerprint
from lora_runtime.types import Site, SiteGroup, Task


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The parameters of one task's head around the backbone.

    `shapes` has every parameter of the head's linear layers, None standing for the number of labels. Those in
    `from_base` are in the base checkpoint (BERT's pooler); an adapter may replace them. The others it must bring.
    `fixed` are parameters outside linear layers, which an adapter cannot replace.
    """

    task: Task
    shapes: dict[str, tuple[int | None, ...]]
    from_base: frozenset[str]
    fixed: frozenset[str]

    @property
    def output(self) -> str:
        """The parameter whose rows are the labels."""
        return next(name for name, shape in self.shapes.items() if shape[0] is None and len(shape) == 2)


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The served base: its sites by module path, its head, its content."""

    name: str
    prefix: str  # of the backbone inside the task class, "bert" for BertForSequenceClassification
    sites: tuple[Site, ...]
    groups: tuple[SiteGroup, ...]
    heads: dict[Task, HeadSpec]
    fingerprint: BaseFingerprint
    max_length: int  # tokens
    modules: frozenset[str]  # every module path of the backbone

    def site(self, name: str) -> Site | None:
        return next((site for site in self.sites if site.name == name), None)
