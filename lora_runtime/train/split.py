"""The rows of one run: train and validation, with one label set, checked against each other."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.data import Example, RowSchema, read_examples
from lora_runtime.types import ProblemType

MIN_TRAIN_ROWS = 4


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What is trained on and what is measured on. `labels` is in the order of the head's rows."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    labels: tuple[str, ...]


def load_rows(train: Path, valid: Path | None, schema: RowSchema, valid_share: float, seed: int) -> TrainingRows:
    """Read and check both files; without a validation file, hold out `valid_share` of the training rows.

    Labels are sorted, as numbers when all of them are whole numbers. Raises TrainingDataInvalid.
    """
    rows = read_examples(train, schema)
    if len(rows) < MIN_TRAIN_ROWS:
        raise TrainingDataInvalid(train, None, f"has {len(rows)} rows, training needs at least {MIN_TRAIN_ROWS}")
    labels = _label_set(train, rows, schema)
    if valid is None:
        kept, held_out = split_examples(rows, valid_share, seed, schema.problem_type)
        if not held_out:
            message = "no label has two rows, so none can be held out; add rows or give a validation file"
            raise TrainingDataInvalid(train, None, message)
        return TrainingRows(kept, held_out, labels)
    held_out = read_examples(valid, schema)
    _check_same_kind(valid, held_out, rows, labels)
    return TrainingRows(rows, held_out, labels)


def split_examples(
    rows: Sequence[Example], valid_share: float, seed: int, problem_type: ProblemType
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split into train and validation rows, each in file order; the same seed gives the same split.

    Single-label rows are stratified: each label with two rows or more gives `valid_share` of them, at least
    one and never all. Other rows have no classes to keep and are drawn from as a whole by the same rule.
    """
    strata: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        strata[row.labels[0] if problem_type is ProblemType.SINGLE_LABEL else ""].append(index)
    draw = random.Random(seed)
    held_out: set[int] = set()
    for name in sorted(strata):
        members = strata[name]
        count = min(max(1, round(valid_share * len(members))), len(members) - 1)
        held_out.update(draw.sample(members, count))
    train = tuple(row for index, row in enumerate(rows) if index not in held_out)
    valid = tuple(row for index, row in enumerate(rows) if index in held_out)
    return train, valid


def _label_set(path: Path, rows: Sequence[Example], schema: RowSchema) -> tuple[str, ...]:
    if schema.problem_type is ProblemType.REGRESSION:
        if len({row.value for row in rows}) == 1:
            raise TrainingDataInvalid(path, None, f"every {schema.label} is the same: there is nothing to learn")
        return (schema.label,)  # the head's one row is called as its column is
    names = {name for row in rows for name in row.labels}
    if not names:
        raise TrainingDataInvalid(path, None, "no row names a label")
    if len(names) == 1 and schema.problem_type is ProblemType.SINGLE_LABEL:
        message = f"has only one label, {next(iter(names))!r}; a classifier needs two"
        raise TrainingDataInvalid(path, None, message)
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _check_same_kind(path: Path, valid: Sequence[Example], train: Sequence[Example], labels: tuple[str, ...]) -> None:
    known = set(labels)
    for row in valid:
        for name in row.labels:
            if name not in known:
                message = f"label {name!r} does not occur in the training file"
                raise TrainingDataInvalid(path, row.line, message)
    if (valid[0].text_pair is None) != (train[0].text_pair is None):
        message = "one file holds text pairs, the other single texts; give both the same columns"
        raise TrainingDataInvalid(path, valid[0].line, message)
