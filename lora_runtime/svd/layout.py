"""Ranks, targets and whole modules as PEFT's config writes them: each promise holds for exactly what is saved."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from lora_runtime.svd.sites import kind_of_path

N = TypeVar("N", int, float)


def rank_fields(ranks: Mapping[str, int], alphas: Mapping[str, float] | None = None) -> dict[str, Any]:
    """`r`, `lora_alpha` and the two patterns, from each module's rank and alpha; no alphas: a scaling of 1.

    What most modules have is the default, the others get a pattern each. PEFT matches `(.*\\.)?(pattern)$` from the
    start of a path, so a pattern that begins with ^ is of that path alone.
    """
    alphas = alphas or {path: float(rank) for path, rank in ranks.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {f"^{re.escape(path)}": own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(path)}": _whole(own) for path, own in alphas.items() if own != alpha},
    }


def _most_common(values: Iterable[N]) -> N:
    """Of equally common ones the smallest, so that a run gives the same bytes as the last."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _whole(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


def target_names(adapted: Collection[str], all_modules: Iterable[str]) -> list[str]:
    """Endings of paths, whole pieces each, that match the adapted modules and no other: short where that is enough."""
    return _short_names(adapted, all_modules, lambda path, name: f".{path}".endswith(f".{name}"))


def whole_names(saved: Collection[str], all_modules: Iterable[str]) -> list[str]:
    """For `modules_to_save`, whose names PEFT matches as mere endings of paths."""
    return _short_names(saved, all_modules, str.endswith)


def _short_names(chosen: Collection[str], modules: Iterable[str], matches: Callable[[str, str], bool]) -> list[str]:
    others = [path for path in modules if path not in chosen]
    names: set[str] = set()
    for path in chosen:
        short = kind_of_path(path)
        names.add(path if any(matches(other, short) for other in others) else short)
    return sorted(names)
