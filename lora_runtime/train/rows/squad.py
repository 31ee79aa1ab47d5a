"""SQuAD's JSON, versions 1.1 and 2.0: articles, their paragraphs, and the questions on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.cells import kind_of
from lora_runtime.train.rows.place import Place

Question = tuple[Place, dict[str, Any], object]  # where, the question's object, its context


def is_squad(value: object) -> bool:
    """Whether a file's JSON value looks like SQuAD's: an object with `data`."""
    return isinstance(value, dict) and "data" in value


def read_squad(path: Path, value: dict[str, Any]) -> Iterator[Question]:
    """Every question with its context, in the order of the file; `value` is the whole file."""
    number = 0
    for a, article in enumerate(_objects(path, "data", value["data"])):
        where = f"data[{a}].paragraphs"
        for p, paragraph in enumerate(_objects(path, where, article.get("paragraphs"))):
            place = f"{where}[{p}]"
            if "context" not in paragraph:
                raise TrainingDataInvalid(path, None, f"{place} has no context")
            for question in _objects(path, f"{place}.qas", paragraph.get("qas")):
                number += 1
                name = f"question {question['id']!r}" if "id" in question else f"question {number}"
                yield Place(path, None, name), question, paragraph["context"]


def _objects(path: Path, where: str, value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise TrainingDataInvalid(path, None, f"{where} is {kind_of(value)}, not a list, as SQuAD's JSON has it")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise TrainingDataInvalid(path, None, f"{where}[{index}] is {kind_of(item)}, not an object")
    return value
