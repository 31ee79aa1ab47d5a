"""Rows of every task that can be learnt in a few steps."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {"PER": ["anna", "leo", "mary", "tom"], "LOC": ["oslo", "rome", "bern"]}
COLOURS = {"one": "uno", "two": "dos", "three": "tres", "four": "cuatro"}


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        kind = draw.choice(sorted(NAMES))
        words = ["then", draw.choice(NAMES[kind]), draw.choice(NAMES[kind]), "went", "home."]
        rows.append({"tokens": words, "tags": ["O", f"B-{kind}", f"I-{kind}", "O", "O"]})
    return rows


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        place, person = draw.choice(NAMES["LOC"]), draw.choice(NAMES["PER"])
        context = f"{'the way is long and ' * (number % 3 * 8)}the {person} of whom i speak went to {place} last year"
        answers = [] if number % 5 == 0 else [{"text": place, "answer_start": context.index(place)}]
        rows.append({"id": f"q{number}", "question": "where to?", "context": context, "answers": answers})
    return rows


def translations(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        words = draw.choices(sorted(COLOURS), k=draw.randint(1, 3))
        rows.append({"source": " ".join(words), "target": " ".join(COLOURS[word] for word in words)})
    return rows


def pairs(count: int, seed: int, *, negative: bool = False, score: bool = False) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        word, other = draw.sample(sorted(COLOURS), 2)
        right = draw.random() < 0.5 if score else True
        row: dict[str, Any] = {"text": f"say {word}", "positive": COLOURS[word if right else other]}
        rows.append(
            row | ({"negative": COLOURS[other]} if negative else {}) | ({"score": float(right)} if score else {})
        )
    return rows


def topics(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    kinds = [draw.choice(sorted(NAMES)) for _ in range(count)]
    return [{"text": f"it is {draw.choice(NAMES[kind])}", "label": kind} for kind in kinds]
