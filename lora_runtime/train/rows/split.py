"""Training and validation rows of one run: given as two files, in one folder, or split by us."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.files import Part, has_validation
from lora_runtime.train.rows.place import Place

MIN_TRAIN_ROWS = 4


class _Row(Protocol):
    @property
    def place(self) -> Place: ...


T = TypeVar("T")
R = TypeVar("R", bound=_Row)


@dataclass(frozen=True, slots=True)
class TaskRows(Generic[T]):
    """What is trained on and what is measured on. `labels` is in the order of the head's rows; () without labels."""

    train: tuple[T, ...]
    valid: tuple[T, ...]
    labels: tuple[str, ...] = ()


def read_both(
    train: Path, valid: Path | None, read: Callable[[Path, Part], tuple[T, ...]]
) -> tuple[tuple[T, ...], tuple[T, ...] | None]:
    """Training rows, and validation rows of the file given or of a folder that has both, else None."""
    rows = read(train, Part.TRAIN)
    if len(rows) < MIN_TRAIN_ROWS:
        raise TrainingDataInvalid(train, None, f"has {len(rows)} rows, training needs at least {MIN_TRAIN_ROWS}")
    if valid is None and has_validation(train):
        valid = train
    return rows, None if valid is None else read(valid, Part.VALID)


def hold_out_stratified(
    rows: Sequence[T], stratum: Callable[[T], str], valid_share: float, seed: int
) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Split into train and validation rows, each in file order; the same seed gives the same split.

    Each stratum with two rows or more gives `valid_share` of them, at least one and never all.
    """
    strata: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        strata[stratum(row)].append(index)
    draw = random.Random(seed)
    held_out: set[int] = set()
    for name in sorted(strata):
        members = strata[name]
        count = min(max(1, round(valid_share * len(members))), len(members) - 1)
        held_out.update(draw.sample(members, count))
    return _parted(rows, held_out)


def hold_out_groups(
    rows: Sequence[T], group: Callable[[T], Hashable], valid_share: float, seed: int
) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Split so that rows of one group stay on one side; each side in file order, the same for the same seed.

    Whole groups are drawn while the validation rows stay within `valid_share` of all, rounded. Where not even one
    group fits, the smallest is held out. With a single group there is nothing to hold out: the second part is ().
    """
    groups: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(group(row), []).append(index)
    order = list(groups.values())
    if len(order) < 2:
        return tuple(rows), ()
    random.Random(seed).shuffle(order)
    target = min(max(1, round(valid_share * len(rows))), len(rows) - 1)
    held_out: set[int] = set()
    for members in order:
        if len(held_out) + len(members) <= target:
            held_out.update(members)
    return _parted(rows, held_out or set(min(order, key=len)))


def grouped_rows(
    train: Path,
    rows: tuple[T, ...],
    held_out: tuple[T, ...] | None,
    group: Callable[[T], Hashable],
    what: str,
    valid_share: float,
    seed: int,
) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """The rows of both sides, split by `hold_out_groups` if `held_out` is None; `what` names a group in refusals."""
    if held_out is not None:
        return rows, held_out
    kept, held_out = hold_out_groups(rows, group, valid_share, seed)
    if not held_out:
        message = f"every row has the same {what}, so none can be held out; add rows or give a validation file"
        raise TrainingDataInvalid(train, None, message)
    return kept, held_out


def require_rows(path: Path, rows: Iterable[T]) -> tuple[T, ...]:
    """All of `rows`; raises TrainingDataInvalid when there is none."""
    found = tuple(rows)
    if not found:
        raise TrainingDataInvalid(path, None, "has no rows")
    return found


def check_one_kind(rows: Sequence[R], has: Callable[[R], bool], column: str) -> None:
    """Refuse a file of which some rows have `column` and others lack it."""
    first = has(rows[0])
    for row in rows:
        if has(row) != first:
            raise row.place.invalid(f"{'lacks' if first else 'has'} {column}, other than the rows before it")


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct names, sorted, as numbers when all of them are whole numbers."""
    distinct = set(names)
    if all(name.isascii() and name.isdigit() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def _parted(rows: Sequence[T], held_out: set[int]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    train = tuple(row for index, row in enumerate(rows) if index not in held_out)
    valid = tuple(row for index, row in enumerate(rows) if index in held_out)
    return train, valid
