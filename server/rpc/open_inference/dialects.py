"""Which dialect a model speaks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterCard, Task
from server.rpc.open_inference.answer_question import ANSWERS
from server.rpc.open_inference.classify import CLASSIFICATION
from server.rpc.open_inference.classify_tokens import TOKEN_CLASSES
from server.rpc.open_inference.dialect import Dialect
from server.rpc.open_inference.embed import EMBEDDINGS
from server.rpc.open_inference.generate import GENERATION

DIALECTS: dict[Task, Dialect[Any, Any]] = {
    dialect.task: dialect for dialect in (CLASSIFICATION, TOKEN_CLASSES, ANSWERS, EMBEDDINGS, GENERATION)
}


def main_dialect(card: AdapterCard) -> Dialect[Any, Any]:
    """What its metadata tells; a base that generates and embeds is taken for one that generates."""
    return DIALECTS[card.second_task or card.task]


def dialect_for(card: AdapterCard, wanted: Iterable[str]) -> Dialect[Any, Any]:
    """The one that has the outputs `wanted`; raises InvalidRequest on `outputs.{name}` for those that none has."""
    names = [*wanted]
    dialects = [main_dialect(card), DIALECTS[card.task]]
    for dialect in dialects:
        if {*names} <= {spec.name for spec in dialect.outputs(card)}:
            return dialect
    known = [spec.name for spec in dialects[0].outputs(card)]
    unknown = next(name for name in names if name not in known)
    raise InvalidRequest(f"outputs.{unknown[:64]}", f"is no output of this model; it has {', '.join(known)}")
